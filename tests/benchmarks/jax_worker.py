"""The generator step in JAX and optax, in a process of its own: it takes orders on its input.

It runs in an environment that has JAX and no PyTorch, so it imports nothing of this project. Its
clock counts the seconds that it works, and none that the orders take.

G runs once, outside the scan. Of the forms that a JAX user would try, it takes the fastest: weights
as (in, out) or as PyTorch has them, the steps recomputed in the backward pass (`jax.checkpoint`) or
not.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax


def convolved(x: Any, weight: Any, *, stride: int = 1, padding: int = 0, dilation: int = 1) -> Any:
    return lax.conv_general_dilated(
        x,
        weight,
        (stride, stride),
        [(padding, padding)] * 2,
        lhs_dilation=(dilation, dilation),
        dimension_numbers=("NCHW", "OIHW", "NCHW"),
    )


def network(layers: Any, *, in_out: bool) -> Any:
    """Return the function of (parameters in PyTorch's order, batch) that the layers stand for.

    With ``in_out`` the weights of linear layers are (in, out).
    """

    def call(parameters: Any, x: Any) -> Any:
        rest = iter(parameters)
        for name, *sizes in layers:
            if name == "linear":
                weight, bias = next(rest), next(rest)
                x = x @ (weight if in_out else weight.T) + bias
            elif name == "conv":
                weight, bias = next(rest), next(rest)
                x = convolved(x, weight, stride=sizes[3], padding=sizes[4])
                x = x + bias[:, None, None]
            elif name == "unbiased_conv":
                x = convolved(x, next(rest), stride=sizes[3], padding=sizes[4])
            elif name == "transposed":  # the adjoint of a convolution
                weight, bias = next(rest), next(rest)
                weight = jnp.flip(weight, (2, 3)).swapaxes(0, 1)
                padding = sizes[2] - 1 - sizes[4]
                x = convolved(x, weight, padding=padding, dilation=sizes[3])
                x = x + bias[:, None, None]
            elif name == "batch_norm":  # in training; running statistics are not kept
                weight, bias = next(rest), next(rest)
                mean = x.mean((0, 2, 3), keepdims=True)
                variance = x.var((0, 2, 3), keepdims=True)
                x = (x - mean) * lax.rsqrt(variance + 1e-5)
                x = x * weight[:, None, None] + bias[:, None, None]
            elif name == "unflatten":
                x = x.reshape(len(x), *sizes)
            else:
                x = ACTIVATIONS[name](x)
        return x

    return call


ACTIVATIONS = {
    "relu": jax.nn.relu,
    "leaky_relu": lambda x: jax.nn.leaky_relu(x, 0.2),
    "tanh": jnp.tanh,
    "flatten": lambda x: x.reshape(len(x), -1),
}


def build(setting: Any, arrays: Any, *, in_out: bool, remat: bool) -> Any:
    """Return the compiled step: theta_G -> (f_K, its gradient)."""
    generator = network(setting["generator"], in_out=in_out)
    discriminator = network(setting["discriminator"], in_out=in_out)
    theta_d, z, real = arrays["d"], arrays["z"][0], arrays["real"][0]
    optimizer = optax.adam(
        setting["lr"], *setting["betas"], eps=setting["eps"], eps_root=setting["eps_root"]
    )

    def f(fake: Any, theta_d: Any) -> Any:
        on_fake, on_real = discriminator(theta_d, fake), discriminator(theta_d, real)
        return -jax.nn.softplus(-on_real).mean() - jax.nn.softplus(on_fake).mean()

    def live(part: Any) -> Any:
        if not isinstance(part, optax.ScaleByAdamState):
            return part
        count = jnp.asarray(setting["steps"], part.count.dtype)
        return optax.ScaleByAdamState(count=count, mu=arrays["mu"], nu=arrays["nu"])

    def surrogate(theta_g: Any) -> Any:
        fake = generator(theta_g, z)

        def step(carry: Any, _: Any) -> Any:
            theta, state = carry
            gradients = jax.grad(lambda theta: -f(fake, theta))(theta)
            updates, state = optimizer.update(gradients, state, theta)
            return (optax.apply_updates(theta, updates), state), None

        state = tuple(map(live, optimizer.init(theta_d)))
        body = jax.checkpoint(step) if remat else step
        (theta, _), _ = lax.scan(body, (theta_d, state), length=setting["unroll_steps"])
        return f(fake, theta)

    return jax.jit(jax.value_and_grad(surrogate))


def oriented(arrays: Any, *, in_out: bool) -> Any:
    """Return the arrays of all parameters with the weights of linear layers as (in, out)."""
    if not in_out:
        return arrays
    parameters = ("g", "d", "mu", "nu")
    turned = {n: [a.T if a.ndim == 2 else a for a in arrays[n]] for n in parameters}
    return {**arrays, **turned}


def fastest(setting: Any, arrays: Any, trials: int = 5) -> tuple[Any, Any, bool, dict[str, Any]]:
    """Return the fastest form's step, its theta_G, its orientation, and what was measured."""
    forms = [(in_out, remat) for in_out in (True, False) for remat in (True, False)]
    if setting["unroll_steps"] == 0:
        forms = [form for form in forms if not form[1]]
    tried, measured = [], {}
    for in_out, remat in forms:
        given = oriented(arrays, in_out=in_out)
        step, theta = build(setting, given, in_out=in_out, remat=remat), given["g"]
        times = []
        for _ in range(trials + 1):
            start = time.perf_counter()
            jax.block_until_ready(step(theta))
            times.append(time.perf_counter() - start)
        name = f"({'in, out' if in_out else 'out, in'}){', remat' * remat}"
        median = sorted(times[1:])[trials // 2]
        measured[name] = round(1e3 * median, 3)
        tried.append((median, step, theta, in_out, {"first": times[0], "form": name}))
    _, step, theta, in_out, found = min(tried, key=lambda form: form[0])
    return step, theta, in_out, {**found, "forms": measured}


def main() -> None:
    folder = Path(sys.argv[1])
    setting = json.loads((folder / "setting.json").read_text())
    arrays = {}
    with np.load(folder / "arrays.npz") as file:
        for name in ("g", "d", "mu", "nu", "z", "real"):
            members = [key for key in file.files if key.rpartition(" ")[0] == name]
            members.sort(key=lambda key: int(key.rpartition(" ")[2]))
            arrays[name] = [jnp.asarray(file[key]) for key in members]
    step, theta_g, in_out, found = fastest(setting, arrays)
    versions = {"jax": jax.__version__, "optax": optax.__version__}
    print(json.dumps(versions | found), flush=True)
    for order in sys.stdin:
        start = time.perf_counter()
        _, gradient = jax.block_until_ready(step(theta_g))
        seconds = time.perf_counter() - start
        if order.strip() == "gradient":
            own = [g.T if in_out and g.ndim == 2 else g for g in gradient]
            np.savez(folder / "gradient.npz", *map(np.asarray, own))
        status = Path("/proc/self/status").read_text()
        (peak,) = (line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))
        print(json.dumps({"seconds": seconds, "peak_kib": int(peak)}), flush=True)


if __name__ == "__main__":
    main()
