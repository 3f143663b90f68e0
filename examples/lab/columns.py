"""The columns of the records: what tables call them, and what they mean."""

from collections.abc import Iterable

COLUMNS: dict[str, tuple[str, str]] = {
    "unroll_steps": ("K", "look-ahead steps of D in the generator's loss"),
    "pairs": ("pairs", "of one update of D and one of G"),
    "batch_size": ("batch", "samples of a minibatch"),
    "discriminator_steps": ("D steps", "real updates of D for each update of G"),
    "generator_steps": ("G steps", "updates of G for each update of D"),
    "stop_gradient": ("first term", "whether G follows the first term of Eq. 12 alone"),
    "average": ("averaged", "whether G's loss is the mean of f_1..f_K"),
    "resample": ("fresh", "whether each look-ahead step has its own minibatch"),
    "half_life": ("half-life", "pairs after which both learning rates have halved; 0: constant"),
    "weight_deviation": ("deviation", "the standard deviation of the modes' weights"),
    "members": ("N", "discriminators of the past in G's loss"),
    "delay": ("delay", "updates of D from one of them to the next"),
    "live": ("live", "whether the newest member is D itself, and not D as last sampled"),
    "normalise": ("normalised", "whether D's last layer has unit norm"),
    "size": ("X", "the width of D, or of both networks, as a part of the paper's"),
    "generator_lr": ("rate of G", "Adam's learning rate for G"),
    "discriminator_lr": ("rate of D", "and for D"),
    "modes": ("modes", "modes with at least one high-quality sample"),
    "modes_quarter_share": (
        "modes, quarter share",
        "modes with at least a quarter of the samples that they should have, all high-quality",
    ),
    "percent_high_quality": (
        "% high quality",
        "samples within three standard deviations of a mode (98.89 of perfect samples)",
    ),
    "reverse_kl_high_quality": ("KL, HQ", "reverse KL over the modes, of high-quality samples"),
    "reverse_kl_all": (
        "reverse KL",
        "KL(samples || data) over the modes, in nats; each sample counts for its nearest mode",
    ),
    "rotations": (
        "rotations",
        "how often the mode that holds over half of the samples changed between evaluations",
    ),
    "late_modes": ("late modes", "modes, averaged over the last third of the training"),
    "late_percent_high_quality": ("late % HQ", "% high quality, averaged over the last third"),
    "late_percent_outside": (
        "late % outside",
        "samples outside the figures' window, averaged over the last third",
    ),
    "late_reverse_kl_all": ("late reverse KL", "reverse KL, averaged over the last third"),
    "late_second_term": (
        "second / first",
        "norm of the second term of Eq. 12 over that of the first, averaged over the last third",
    ),
    "covers": ("cover", "share of the models that cover both clusters at the end"),
    "collapsed": ("collapsed", "evaluations with all samples at one cluster"),
    "on_plateau": ("on plateau", "those of them with D's loss at its collapsed optimum"),
    "d_loss": ("D's loss", "the discriminator's loss"),
    "g_loss": ("G's loss", "the generator's loss"),
    "f_0": ("f_0", "the generator's loss at the present D"),
    "f_K": ("f_K", "the generator's loss K steps ahead, which it follows"),
    "classes": ("digits", "digits with at least one sample, by the classifier"),
    "classes_of_a_percent": ("digits of 1 %", "digits with at least 1 % of the samples"),
    "class_entropy": ("entropy", "of the samples over the digits, in nats (ln 10 = 2.30 at most)"),
    "spread": ("variance", "of the samples, summed over pixels, as a part of the data's"),
    "variance": ("variance", "of the samples, summed over pixels, as a part of the data's"),
    "largest_mode_changes": ("changes", "how often the most frequent digit became another"),
    "reverse_kl": ("reverse KL", "KL(samples || uniform) over the 1,000 modes, in nats"),
    "curve_modes": ("modes of 2,560", "modes with at least one of 2,560 samples"),
    "curve_reverse_kl": ("KL of 2,560", "reverse KL of 2,560 samples, in nats"),
    "js_divergence": ("JS", "JS divergence of the colours of samples and data, in nats"),
    "js_floor": ("floor", "the same of two sets of data"),
    "js_single_colour": ("one colour", "the same of the data and a single colour"),
    "colour_variance": ("variance", "of the colours, as a part of the data's"),
    "discarded": ("discarded", "share of the images whose digit is too dark to tell"),
    "mean_d_gradient": ("gradient", "norm of D's gradient, averaged over training"),
    "mean_d_update": ("update", "norm of D's update, averaged over training"),
    "mean_d_on_pattern": ("D(pattern)", "D's output on the sample nearest to the samples' mean"),
    "taken_for_real": ("taken for real", "share of the evaluations at which it exceeds 0.5"),
    "mean_learned": ("learned", "how far D's output on a pattern fell by the next evaluation"),
    "mse": ("MSE", "of reconstructions, over pixels and channels in [-1, 1]"),
    "median": ("median", "distance of two samples, l2 in pixels in [-1, 1]"),
    "median_data": ("median, data", "distance of two training images"),
    "wasserstein": ("W1", "Wasserstein-1 distance of the samples' distances to the data's"),
    "wasserstein_data": ("W1, data", "the same of two draws from the data"),
    "fid": ("FID", "Fréchet distance of features; less is better"),
    "kid": ("KID", "kernel distance of features; less is better"),
    "inception_score": ("IS", "Inception Score, by the named features"),
    "precision": ("precision", "share of the samples within the data's manifold"),
    "recall": ("recall", "share of the data within the samples' manifold"),
    "f_8": ("F_8", "of the precision-recall distribution, weighing recall"),
    "f_1_8": ("F_1/8", "the same, weighing precision"),
    "cpu_seconds": ("CPU s", "seconds of the process, for all models trained side by side"),
    "seconds": ("seconds", "of CPU time, for all models trained side by side"),
    "seconds_a_pair": ("s a pair", "CPU seconds of a pair of updates"),
    "images_a_second": ("images/s", "images of the data that training goes through in a second"),
    "data_seconds_a_pair": ("s of data", "CPU seconds of making a pair's real batches"),
    "preset_pairs": ("pairs of the preset", "that the preset trains for"),
    "value": ("value", "as published"),
}


def title(name: str) -> str:
    """Return the heading of a column."""
    return COLUMNS.get(name, (name.replace("_", " "), ""))[0]


def explained(names: Iterable[str]) -> str:
    """Return what columns mean, those that need saying."""
    known = [COLUMNS[name] for name in names if name in COLUMNS]
    return "; ".join(f"{heading}: {meaning}" for heading, meaning in known) + "."
