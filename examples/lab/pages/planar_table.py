"""The table that sections on mixtures in the plane have."""

from lab.pages.claims import Records, shown, table

HEADS = {"unroll_steps": "K", "stop_gradient": "terms", "weight_deviation": "weights"}
SHOWN = {
    ("stop_gradient", "False"): "both",
    ("stop_gradient", "True"): "first",
    ("normalise", "False"): "no",
    ("normalise", "True"): "yes",
}


def planar(records: Records, *names: str) -> str:
    """Return the table of an experiment on mixtures in the plane."""
    lines = []
    modes = max(records.values("modes"), default=0)
    for setting in records.settings(*names):
        seeds = records.pick(**dict(zip(names, setting, strict=True)))
        full = sum(value == modes for value in seeds.values("modes"))
        cells = [shown(seeds.values(c)) for c in ("modes", "percent_high_quality")]
        kl = shown(seeds.values("reverse_kl_all"), 3)
        rotations = shown(seeds.values("rotations"), 1)
        seconds = f"{seeds.values('seconds')[0]:.0f}"
        shared = [SHOWN.get(pair, pair[1]) for pair in zip(names, setting, strict=True)]
        lines.append((*shared, f"{full} / {len(seeds.rows)}", *cells, kl, rotations, seconds))
    head = [HEADS.get(name, name.replace("_", " ")) for name in names]
    head += [f"seeds with {modes:.0f} modes", "modes", "% high quality", "reverse KL, all"]
    return table([*head, "rotations", "seconds of all seeds"], lines)
