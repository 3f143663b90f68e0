"""The generator step in JAX and optax, in a process of its own: it takes orders on its input.

It runs in an environment that has JAX and no PyTorch, so it imports nothing of this project. Its
clock counts the seconds that it works, and none that the orders take.
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


def network(layers: Any) -> Any:
    """Return the function of (parameters in PyTorch's order, batch) that the layers stand for."""

    def call(parameters: Any, x: Any) -> Any:
        rest = iter(parameters)
        for name, *sizes in layers:
            if name == "linear":
                weight, bias = next(rest), next(rest)
                x = x @ weight.T + bias
            elif name == "conv":
                weight, bias = next(rest), next(rest)
                x = convolved(x, weight, stride=sizes[3], padding=sizes[4])
                x = x + bias[:, None, None]
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


def build(setting: Any, arrays: Any) -> Any:
    """Return the compiled step: theta_G -> (f_K, its gradient)."""
    generator, discriminator = network(setting["generator"]), network(setting["discriminator"])
    theta_d, z, real = arrays["d"], arrays["z"][0], arrays["real"][0]
    optimizer = optax.adam(
        setting["lr"], *setting["betas"], eps=setting["eps"], eps_root=setting["eps_root"]
    )

    def f(theta_g: Any, theta_d: Any) -> Any:
        fake = discriminator(theta_d, generator(theta_g, z))
        return -jax.nn.softplus(-discriminator(theta_d, real)).mean() - jax.nn.softplus(fake).mean()

    def live(part: Any) -> Any:
        if not isinstance(part, optax.ScaleByAdamState):
            return part
        count = jnp.asarray(setting["steps"], part.count.dtype)
        return optax.ScaleByAdamState(count=count, mu=arrays["mu"], nu=arrays["nu"])

    def surrogate(theta_g: Any) -> Any:
        def step(carry: Any, _: Any) -> Any:
            theta, state = carry
            gradients = jax.grad(lambda theta: -f(theta_g, theta))(theta)
            updates, state = optimizer.update(gradients, state, theta)
            return (optax.apply_updates(theta, updates), state), None

        state = tuple(map(live, optimizer.init(theta_d)))
        (theta, _), _ = lax.scan(step, (theta_d, state), length=setting["unroll_steps"])
        return f(theta_g, theta)

    return jax.jit(jax.value_and_grad(surrogate))


def main() -> None:
    folder = Path(sys.argv[1])
    setting = json.loads((folder / "setting.json").read_text())
    arrays = {}
    with np.load(folder / "arrays.npz") as file:
        for name in ("g", "d", "mu", "nu", "z", "real"):
            members = [key for key in file.files if key.rpartition(" ")[0] == name]
            members.sort(key=lambda key: int(key.rpartition(" ")[2]))
            arrays[name] = [jnp.asarray(file[key]) for key in members]
    step, theta_g = build(setting, arrays), arrays["g"]
    print(json.dumps({"jax": jax.__version__, "optax": optax.__version__}), flush=True)
    for order in sys.stdin:
        start = time.perf_counter()
        _, gradient = jax.block_until_ready(step(theta_g))
        seconds = time.perf_counter() - start
        if order.strip() == "gradient":
            np.savez(folder / "gradient.npz", *map(np.asarray, gradient))
        status = Path("/proc/self/status").read_text()
        (peak,) = (line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))
        print(json.dumps({"seconds": seconds, "peak_kib": int(peak)}), flush=True)


if __name__ == "__main__":
    main()
