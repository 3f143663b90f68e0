"""Random graphs of layers, and the same spelled out in elementary operations.

The latter shares nothing with ``unroll`` and has right derivatives of every order, since no layer
in it has a hand-written backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import _SpectralNorm, _WeightNorm

WIDTH = 8  # of every block
Block = tuple[Any, ...]  # the name of a layer, or of a join and the blocks that it joins


class SelfAttention(nn.Module):
    """Attention of tokens to each other, ``(N, T, E)`` to the same."""

    def __init__(self, width: int, heads: int, *, need_weights: bool) -> None:
        super().__init__()
        self.mix = nn.MultiheadAttention(width, heads, batch_first=True)
        self.need_weights = need_weights

    def forward(self, x: Tensor) -> Tensor:
        mixed: Tensor = self.mix(x, x, x, need_weights=self.need_weights)[0]
        return mixed


class CausalAttention(nn.Module):
    """``scaled_dot_product_attention`` with one head."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.project = nn.Linear(width, 3 * width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unsqueeze(1) for t in self.project(x).chunk(3, -1))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).squeeze(1)


class Recurrent(nn.Module):
    """All outputs of a recurrent layer."""

    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.layer(x)[0]
        return output


class Residual(nn.Module):
    """``x + block(x)``."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = x + self.block(x)
        return output


class Concatenation(nn.Module):
    """Two branches side by side, joined by a linear layer."""

    def __init__(self, first: nn.Module, second: nn.Module, width: int) -> None:
        super().__init__()
        self.first, self.second, self.join = first, second, nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.join(torch.cat([self.first(x), self.second(x)], 1))
        return output


class Tied(nn.Module):
    """Two linear layers with one weight between them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.second(torch.tanh(self.first(x)))
        return output


class Spare(nn.Module):
    """A gain, and parameters that no output depends on."""

    def __init__(self) -> None:
        super().__init__()
        self.gain, self.unused = nn.Parameter(torch.tensor(0.7)), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gain


class Averaging(nn.Module):
    """Buffers that the forward pass uses and changes, by assignment and in place."""

    mean: Tensor
    count: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        self.mean = 0.8 * self.mean + 0.2 * x.detach().mean(0)
        return (x - self.mean) / (1 + self.count).sqrt()


def _viewed(layer: nn.Module, *shape: int) -> nn.Module:
    return nn.Sequential(nn.Unflatten(1, shape), layer, nn.Flatten())


LEAVES: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(WIDTH, WIDTH),
    "tanh": nn.Tanh,
    "relu": nn.ReLU,
    "relu, in place": lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(inplace=True)),
    "leaky": lambda: nn.LeakyReLU(0.2),
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "elu": nn.ELU,
    "softplus": nn.Softplus,
    "sigmoid": nn.Sigmoid,
    "prelu": nn.PReLU,
    "dropout": lambda: nn.Dropout(0.3),
    "conv": lambda: _viewed(nn.Conv2d(2, 2, 3, padding=1), 2, 2, 2),
    "batch norm": lambda: nn.BatchNorm1d(WIDTH),
    "instance norm": lambda: _viewed(nn.InstanceNorm1d(2, affine=True), 2, 4),
    "group norm": lambda: nn.GroupNorm(2, WIDTH),
    "layer norm": lambda: nn.LayerNorm(WIDTH),
    "rms norm": lambda: nn.RMSNorm(WIDTH),
    "weight norm": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH)),
    "weight norm, conv": lambda: _viewed(
        nn.utils.parametrizations.weight_norm(nn.Conv2d(2, 2, 3, padding=1)), 2, 2, 2
    ),
    "spectral norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(WIDTH, WIDTH)),
    "spectral norm, conv": lambda: _viewed(
        nn.utils.parametrizations.spectral_norm(nn.Conv2d(2, 2, 3, padding=1)), 2, 2, 2
    ),
    "spectral norm, hooks": lambda: nn.utils.spectral_norm(nn.Linear(WIDTH, WIDTH)),
    "attention": lambda: _viewed(SelfAttention(4, 2, need_weights=False), 2, 4),
    "attention, weights": lambda: _viewed(SelfAttention(4, 2, need_weights=True), 2, 4),
    "attention, causal": lambda: _viewed(CausalAttention(4), 2, 4),
    "gru": lambda: _viewed(Recurrent(nn.GRU(4, 4, batch_first=True)), 2, 4),
    "lstm": lambda: _viewed(Recurrent(nn.LSTM(4, 4, batch_first=True)), 2, 4),
    "tied": lambda: Tied(WIDTH),
    "spare": Spare,
    "averaging": lambda: Averaging(WIDTH),
}


def build(block: Block) -> nn.Module:
    """Return the layers that a block names."""
    kind, *inner = block
    if kind in LEAVES:
        return LEAVES[kind]()
    if kind == "then":
        return nn.Sequential(*map(build, inner))
    if kind == "residual":
        return Residual(build(inner[0]))
    if kind == "twice":
        layer = build(inner[0])
        return nn.Sequential(layer, nn.Tanh(), layer)
    return Concatenation(build(inner[0]), build(inner[1]), WIDTH)


def leaves(block: Block) -> set[str]:
    """Return the names of all layers in a block."""
    kind, *inner = block
    return set().union({kind} & LEAVES.keys(), *map(leaves, inner))


class Composite:
    """``module`` at given parameters and buffers; the buffers are replaced as it is called.

    Random numbers are drawn in ``draws``, the precision of the module that it is compared with;
    ``rounded`` disturbs what each layer returns.
    """

    def __init__(
        self,
        module: nn.Module,
        parameters: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor],
        draws: torch.dtype,
        rounded: Callable[[Tensor], Tensor] = lambda x: x,
    ) -> None:
        named = [*module.named_parameters(), *module.named_buffers()]
        self._names = {id(tensor): name for name, tensor in named}
        self.module, self.draws, self.rounded = module, draws, rounded
        self.parameters, self.buffers = parameters, dict(buffers)

    def __call__(self, x: Tensor) -> Tensor:
        return self.run(self.module, x)

    def run(self, module: nn.Module, x: Tensor) -> Tensor:
        """Return ``module(x)``."""
        for kind in type(module).__mro__:
            if kind in FUNCTIONS:
                return self.rounded(FUNCTIONS[kind](x))
            if kind in LAYERS:
                return self.rounded(LAYERS[kind](self, module, x))
        raise KeyError(f"{type(module).__name__} is not spelled out")

    def at(self, own: Any) -> Tensor:
        """Return what takes the place of one of the module's own tensors."""
        name = self._names[id(own)]
        return self.parameters[name] if name in self.parameters else self.buffers[name]

    def replace(self, own: Tensor, value: Tensor) -> None:
        """Change a buffer."""
        self.buffers[self._names[id(own)]] = value

    def weight(self, layer: Any) -> Tensor:
        """Return a layer's weight, normalised if it is."""
        if hasattr(layer, "parametrizations"):
            listed = layer.parametrizations.weight
            kind = listed[0]
            if isinstance(kind, _WeightNorm):
                return _directed(self.at(listed.original1), self.at(listed.original0), kind.dim)
            assert isinstance(kind, _SpectralNorm)
            return _divided(self.at(listed.original), self.at(kind._u), self.at(kind._v))
        if hasattr(layer, "weight_g"):
            return _directed(self.at(layer.weight_v), self.at(layer.weight_g), 0)
        if hasattr(layer, "weight_orig"):
            return _divided(*map(self.at, (layer.weight_orig, layer.weight_u, layer.weight_v)))
        return self.at(layer.weight)


def _directed(v: Tensor, g: Tensor, dim: int) -> Tensor:
    """Weight norm: the length ``g`` and the direction of ``v``."""
    dims = [d for d in range(v.dim()) if d != dim]
    return g * v / (v * v).sum(dims, keepdim=True).sqrt()


def _divided(w: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """Spectral norm: divided by the singular value that ``u`` and ``v`` point at."""
    return w / (u[:, None] * w.flatten(1) * v).sum()


def _affine(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return (x.unsqueeze(-2) * weight).sum(-1) + bias


def _linear(c: Composite, m: Any, x: Tensor) -> Tensor:
    return _affine(x, c.weight(m), c.at(m.bias))


def _conv(c: Composite, m: Any, x: Tensor) -> Tensor:
    weight = c.weight(m)
    patches = F.unfold(x, m.kernel_size, padding=m.padding)
    mixed = torch.einsum("oi,nip->nop", weight.flatten(1), patches) + c.at(m.bias)[:, None]
    return mixed.reshape(len(x), len(weight), *x.shape[2:])


def _standardised(x: Tensor, dims: list[int], eps: float) -> tuple[Tensor, Tensor, Tensor]:
    mean = x.mean(dims, keepdim=True)
    variance = ((x - mean) ** 2).mean(dims, keepdim=True)
    return (x - mean) / (variance + eps) ** 0.5, mean, variance


def _batch_norm(c: Composite, m: Any, x: Tensor) -> Tensor:
    if m.training:
        y, mean, variance = _standardised(x, [0], m.eps)
        unbiased = variance.detach()[0] * len(x) / (len(x) - 1)
        for buffer, new in ((m.running_mean, mean.detach()[0]), (m.running_var, unbiased)):
            c.replace(buffer, (1 - m.momentum) * c.at(buffer) + m.momentum * new)
        c.replace(m.num_batches_tracked, c.at(m.num_batches_tracked) + 1)
    else:
        y = (x - c.at(m.running_mean)) / (c.at(m.running_var) + m.eps) ** 0.5
    return y * c.at(m.weight) + c.at(m.bias)


def _instance_norm(c: Composite, m: Any, x: Tensor) -> Tensor:
    y, _, _ = _standardised(x, [2], m.eps)
    return y * c.at(m.weight)[:, None] + c.at(m.bias)[:, None]


def _group_norm(c: Composite, m: Any, x: Tensor) -> Tensor:
    y, _, _ = _standardised(x.reshape(len(x), m.num_groups, -1), [2], m.eps)
    return y.reshape(x.shape) * c.at(m.weight) + c.at(m.bias)


def _layer_norm(c: Composite, m: Any, x: Tensor) -> Tensor:
    return _standardised(x, [-1], m.eps)[0] * c.at(m.weight) + c.at(m.bias)


def _rms_norm(c: Composite, m: Any, x: Tensor) -> Tensor:
    eps = torch.finfo(c.draws).eps if m.eps is None else m.eps
    return x / ((x * x).mean(-1, keepdim=True) + eps) ** 0.5 * c.at(m.weight)


def _dropout(c: Composite, m: Any, x: Tensor) -> Tensor:
    if not m.training:
        return x
    kept = torch.empty(x.shape, dtype=c.draws, device=x.device).bernoulli_(1 - m.p)
    dropped: Tensor = x * kept.to(x.dtype) / (1 - m.p)
    return dropped


def _softmax(scores: Tensor) -> Tensor:
    weights = (scores - scores.detach().amax(-1, keepdim=True)).exp()
    return weights / weights.sum(-1, keepdim=True)


def _self_attention(c: Composite, m: Any, x: Tensor) -> Tensor:
    mixed = _affine(x, c.at(m.mix.in_proj_weight), c.at(m.mix.in_proj_bias))
    heads = []
    for q, k, v in zip(*(t.chunk(m.mix.num_heads, -1) for t in mixed.chunk(3, -1)), strict=True):
        heads.append(_softmax(q @ k.transpose(1, 2) / q.shape[-1] ** 0.5) @ v)
    return _linear(c, m.mix.out_proj, torch.cat(heads, -1))


def _causal_attention(c: Composite, m: Any, x: Tensor) -> Tensor:
    q, k, v = _linear(c, m.project, x).chunk(3, -1)
    later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
    scores = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5
    return _softmax(scores.masked_fill(later, -torch.inf)) @ v


def _recurrent(c: Composite, m: Any, x: Tensor) -> Tensor:
    layer = m.layer
    names = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")
    w_in, w_state, b_in, b_state = (c.at(getattr(layer, name)) for name in names)
    h = cell = x.new_zeros(len(x), layer.hidden_size)
    outputs = []
    for token in x.unbind(1):
        from_input, from_state = _affine(token, w_in, b_in), _affine(h, w_state, b_state)
        if isinstance(layer, nn.GRU):
            reset, update, new = from_input.chunk(3, -1)
            r, z, n = from_state.chunk(3, -1)
            reset, update = (reset + r).sigmoid(), (update + z).sigmoid()
            h = (1 - update) * (new + reset * n).tanh() + update * h
        else:
            i, f, g, o = (from_input + from_state).chunk(4, -1)
            cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
            h = o.sigmoid() * cell.tanh()
        outputs.append(h)
    return torch.stack(outputs, 1)


def _averaging(c: Composite, m: Any, x: Tensor) -> Tensor:
    c.replace(m.count, c.at(m.count) + 1)
    c.replace(m.mean, 0.8 * c.at(m.mean) + 0.2 * x.detach().mean(0))
    return (x - c.at(m.mean)) / (1.0 + c.at(m.count)) ** 0.5


def _sequential(c: Composite, m: Any, x: Tensor) -> Tensor:
    for layer in m:
        x = c.run(layer, x)
    return x


# Layers that are the same function at all parameters.
FUNCTIONS: dict[type[nn.Module], Callable[[Tensor], Tensor]] = {
    nn.Flatten: lambda x: x.reshape(len(x), -1),
    nn.Tanh: lambda x: 2 / (1 + (-2 * x).exp()) - 1,
    nn.Sigmoid: lambda x: 1 / (1 + (-x).exp()),
    # The layer is the identity beyond 20, where log(1 + exp(x)) is off by 2e-9.
    nn.Softplus: lambda x: torch.where(x > 20, x, -F.logsigmoid(-x)),
    nn.SiLU: lambda x: x / (1 + (-x).exp()),
    nn.GELU: lambda x: x * (1 + torch.erf(x / 2**0.5)) / 2,
    # Zeros are met: those of a dead ReLU, normalised. The slope there is 1; that of clamp_max is 0.
    nn.ELU: lambda x: torch.where(x > 0, x, torch.where(x > 0, 0.0, x).exp() - 1),
    nn.ReLU: lambda x: torch.where(x > 0, x, torch.zeros_like(x)),
    nn.LeakyReLU: lambda x: torch.where(x > 0, x, 0.2 * x),
}
LAYERS: dict[type[nn.Module], Callable[[Composite, Any, Tensor], Tensor]] = {
    nn.Sequential: _sequential,
    nn.Linear: _linear,
    nn.Conv2d: _conv,
    nn.BatchNorm1d: _batch_norm,
    nn.InstanceNorm1d: _instance_norm,
    nn.GroupNorm: _group_norm,
    nn.LayerNorm: _layer_norm,
    nn.RMSNorm: _rms_norm,
    nn.Dropout: _dropout,
    nn.Unflatten: lambda _, m, x: x.reshape(len(x), *m.unflattened_size),
    nn.PReLU: lambda c, m, x: torch.where(x > 0, x, c.at(m.weight) * x),
    SelfAttention: _self_attention,
    CausalAttention: _causal_attention,
    Recurrent: _recurrent,
    Averaging: _averaging,
    Spare: lambda c, m, x: x * c.at(m.gain),
    Residual: lambda c, m, x: x + c.run(m.block, x),
    Concatenation: lambda c, m, x: c.run(
        m.join, torch.cat([c.run(m.first, x), c.run(m.second, x)], 1)
    ),
    Tied: lambda c, m, x: c.run(m.second, c.run(m.first, x).tanh()),
}
