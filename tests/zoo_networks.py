"""Whole discriminators of the zoo, each of a kind of its own."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.zoo_layers import mlp


class Attention(nn.Module):
    """Self-attention over a sequence of tokens, in one of several forms."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.embed, self.head = nn.Linear(3, 8), nn.Linear(8, 1)
        if kind == "raw":
            # A key's bias has no effect but round-off, by which Adafactor would step.
            self.mix: nn.Module = nn.Linear(8, 24, bias=False)
        elif kind == "encoder":
            self.mix = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.1, batch_first=True)
        else:
            self.mix = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed(x)
        if self.kind == "raw":
            query, key, value = (t.unsqueeze(1) for t in self.mix(tokens).chunk(3, -1))
            mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True).squeeze(1)
        elif self.kind == "encoder":
            mixed = self.mix(tokens)
        else:
            mixed, _ = self.mix(tokens, tokens, tokens, need_weights=self.kind == "weights")
        output: Tensor = self.head(torch.tanh(mixed).mean(1))
        return output


class Recurrent(nn.Module):
    """A recurrent layer over a sequence."""

    def __init__(self, layer: nn.RNNBase, width: int) -> None:
        super().__init__()
        self.layer, self.head = layer, nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.head(self.layer(x)[0][:, -1])
        return output


class Conditional(nn.Module):
    """Labels by an embedding that is concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.body = nn.Embedding(7, 3), mlp()
        self.join = nn.Linear(7, 4)

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        output: Tensor = self.body(self.join(torch.cat([x, self.embed(label)], 1)))
        return output


class Projection(nn.Module):
    """The projection discriminator (Miyato and Koyama 2018)."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Linear(4, 6), nn.Tanh())
        self.head, self.embed = nn.Linear(6, 1), nn.Embedding(7, 6)

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        features = self.features(x)
        output: Tensor = self.head(features).squeeze(1) + (self.embed(label) * features).sum(1)
        return output


class TwoScales(nn.Module):
    """A multi-scale PatchGAN: a list of score maps."""

    def __init__(self) -> None:
        super().__init__()
        self.scales = nn.ModuleList(
            nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.LeakyReLU(0.2), nn.Conv2d(3, 1, 2))
            for _ in range(2)
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        return [scale(F.avg_pool2d(x, 2**i)) for i, scale in enumerate(self.scales)]


class Summed:
    """An objective of one's own for a D with many outputs."""

    def discriminator_loss(self, d: Any, fake: Any, real: Any) -> Tensor:
        """Sum the hinge-like losses of all maps."""
        pairs = zip(d(fake), d(real), strict=True)
        losses = [F.softplus(f).mean() + F.softplus(-r).mean() for f, r in pairs]
        return torch.stack(losses).sum()

    def generator_loss(self, d: Any, fake: Any, real: Any) -> Tensor:
        """Sum over the maps."""
        return torch.stack([F.softplus(-f).mean() for f in d(fake)]).sum()


class MinibatchDeviation(nn.Module):
    """The standard deviation over the batch as a feature (Karras et al. 2018)."""

    def __init__(self) -> None:
        super().__init__()
        self.features, self.head = nn.Linear(4, 5), nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        features = torch.tanh(self.features(x))
        deviation = (features.var(0, unbiased=False) + 1e-8).sqrt().mean().expand(len(x), 1)
        output: Tensor = self.head(torch.cat([features, deviation], 1))
        return output


class Autoencoder(nn.Module):
    """EBGAN's energy, decoded with the encoder's own weights."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        decoded = F.linear(torch.tanh(self.encoder(x)), self.encoder.weight.T)
        return -(decoded - x).square().mean(1)


class Fourier(nn.Module):
    """A branch on the spectrum."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(2 * 6 * 4, 1)
        self.gain = nn.Parameter(torch.ones(6, 4))

    def forward(self, x: Tensor) -> Tensor:
        spectrum = torch.fft.rfft2(x) * self.gain
        output: Tensor = self.head(torch.log1p(spectrum.abs().square()).flatten(1))
        return output


class Resampling(nn.Module):
    """Interpolation and every kind of pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Conv2d(2, 4, 3, padding=1), nn.Linear(16, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)
        x = F.max_pool2d(torch.tanh(self.first(x)), 2)
        x = F.pixel_unshuffle(F.avg_pool2d(x, 2)[..., :2, :2], 2)
        output: Tensor = self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))
        return output


class Labelled(nn.Module):
    """Labels by an embedding that gates the features."""

    def __init__(self, embed: nn.Module) -> None:
        super().__init__()
        self.embed, self.features = embed, nn.Linear(4, 4)

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        gates: Tensor = self.embed(label)
        return (torch.tanh(self.features(x)) * gates).sum(1)


class Bilinear(nn.Module):
    """A bilinear layer between two views of a sample, and an einsum."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.pair = nn.Linear(4, 3), nn.Bilinear(3, 4, 5)
        self.core = nn.Parameter(torch.randn(5, 5) / 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.pair(torch.tanh(self.left(x)), x)
        return torch.einsum("ni,ij,nj->n", y, self.core, torch.sin(y))


class MinibatchDiscrimination(nn.Module):
    """Distances between all samples of a batch as features (Salimans et al. 2016)."""

    def __init__(self) -> None:
        super().__init__()
        self.features, self.head = nn.Linear(4, 6), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.features(x))
        kernels = y.view(len(x), 2, 3)
        distances = (kernels.unsqueeze(0) - kernels.unsqueeze(1)).abs().sum(3)
        output: Tensor = self.head(torch.cat([y, torch.exp(-distances).sum(1)], 1))
        return output


class MessagePassing(nn.Module):
    """A graph network: gathers and scatters along edges between the samples."""

    edges: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.message, self.head = nn.Linear(8, 4), nn.Linear(4, 1)
        self.register_buffer("edges", torch.tensor([[0, 1, 2, 3, 4, 0], [1, 2, 3, 4, 0, 2]]))

    def forward(self, x: Tensor) -> Tensor:
        source, target = self.edges
        messages = torch.tanh(self.message(torch.cat([x[source], x[target]], 1)))
        received = torch.zeros_like(x).index_add(0, target, messages)
        output: Tensor = self.head(received.scatter_add(0, source.unsqueeze(1), messages[:, :1]))
        return output


class SparseGraph(nn.Module):
    """A sparse adjacency matrix, and distances between the nodes."""

    links: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.features, self.head = nn.Linear(4, 6), nn.Linear(5, 1)
        self.register_buffer("links", torch.eye(5) + torch.eye(5).roll(1, 0) / 2)

    def forward(self, x: Tensor) -> Tensor:
        nodes = torch.tanh(torch.sparse.mm(self.links.to_sparse(), self.features(x)))
        output: Tensor = self.head(torch.cdist(nodes, nodes + 0.5))
        return output


class Sound(nn.Module):
    """The short-time spectrum of a waveform, with gains."""

    window: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.gains, self.head = nn.Parameter(torch.ones(5, 1)), nn.Linear(25, 1)
        self.register_buffer("window", torch.hann_window(8))

    def forward(self, x: Tensor) -> Tensor:
        spectrum = torch.stft(x, 8, 4, window=self.window, return_complex=True) * self.gains
        output: Tensor = self.head(torch.log1p(spectrum.abs().square()).flatten(1))
        return output


class Sorted(nn.Module):
    """Order statistics: sort, topk, cumulative sums, gather."""

    def __init__(self) -> None:
        super().__init__()
        self.features, self.head = nn.Linear(4, 6), nn.Linear(6 + 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.features(x))
        ordered, order = y.sort(1)
        mixed = ordered.cumsum(1).gather(1, order)
        output: Tensor = self.head(torch.cat([mixed, y.topk(2, 1).values], 1))
        return output


class Spatial(nn.Module):
    """A spatial transformer: sampling on a grid that the network predicts."""

    def __init__(self) -> None:
        super().__init__()
        self.where, self.head = nn.Linear(2 * 6 * 6, 6), nn.Linear(2 * 4 * 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        theta = 0.3 * torch.tanh(self.where(x.flatten(1))).view(-1, 2, 3)
        grid = F.affine_grid(theta + torch.eye(2, 3).to(x), [len(x), 2, 4, 4], align_corners=False)
        output: Tensor = self.head(F.grid_sample(x, grid, align_corners=False).flatten(1))
        return output


class Patches(nn.Module):
    """Unfolding into patches and folding back."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.head = nn.Linear(2 * 9, 2 * 9), nn.Linear(2 * 6 * 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        patches = torch.tanh(self.mix(F.unfold(x, 3, padding=1).transpose(1, 2)))
        folded = F.fold(patches.transpose(1, 2), (6, 6), 3, padding=1)
        output: Tensor = self.head(folded.flatten(1))
        return output


class LogDeterminant(nn.Module):
    """Linear algebra over the batch: a log-determinant and a solve."""

    def __init__(self) -> None:
        super().__init__()
        self.features, self.head = nn.Linear(4, 3), nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.features(x))
        covariance = y.T @ y + 0.1 * torch.eye(3).to(y)
        whitened = torch.linalg.solve(covariance, y.T).T
        volume: Tensor = torch.linalg.slogdet(covariance).logabsdet
        scores: Tensor = self.head(whitened).squeeze(1)
        return scores + volume


class InnerGradient(nn.Module):
    """A score that is itself a gradient, by ``torch.func`` or by ``torch.autograd``."""

    def __init__(self, body: nn.Module, *, functional: bool) -> None:
        super().__init__()
        self.functional, self.body = functional, body

    def forward(self, x: Tensor) -> Tensor:
        def energy(x: Tensor) -> Tensor:
            return torch.sin(2 * self.body(x)).sum()

        if self.functional:
            slope: Tensor = torch.func.grad(energy)(x)
            return slope.square().flatten(1).sum(1)
        with torch.enable_grad():
            x = x if x.requires_grad else x.clone().requires_grad_()
            (slope,) = torch.autograd.grad(energy(x), x, create_graph=True)
        return slope.square().flatten(1).sum(1)


class VisionTransformer(nn.Module):
    """Patches, a class token, positions, an encoder with normalisation first."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(2, 8, 3, 3)
        self.token = nn.Parameter(torch.randn(1, 1, 8) / 3)
        self.positions = nn.Parameter(torch.randn(1, 5, 8) / 3)
        layer = nn.TransformerEncoderLayer(
            *(8, 2, 12, 0.0, "gelu"),
            batch_first=True,
            norm_first=True,
            bias=False,  # that of keys has no gradient but round-off, which Adafactor would spread
        )
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(len(x), -1, -1), tokens], 1) + self.positions
        output: Tensor = self.head(self.encoder(tokens)[:, 0])
        return output


class CrossAttention(nn.Module):
    """A transformer decoder layer whose memory is a set of learned queries."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(3, 8), nn.Linear(8, 1)
        self.memory = nn.Parameter(torch.randn(2, 8))
        self.layer = nn.TransformerDecoderLayer(8, 2, 12, 0.1, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.layer(self.embed(x), self.memory.expand(len(x), -1, -1))
        output: Tensor = self.head(mixed.mean(1))
        return output


class Cells(nn.Module):
    """An LSTM cell in a loop."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.LSTMCell(3, 5), nn.Linear(5, 1)

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for token in x.unbind(1):
            state = self.cell(token, state)
        assert state is not None
        output: Tensor = self.head(state[0])
        return output


class Named(nn.Module):
    """Named outputs, and an argument that is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.classes = nn.Linear(4, 6), nn.Linear(6, 3)
        self.head = nn.Linear(6, 1)

    def forward(self, x: Tensor, slope: float = 1.0) -> dict[str, Tensor]:
        features = torch.tanh(slope * self.body(x))
        return {"logits": self.head(features), "classes": self.classes(features)}


class Auxiliary:
    """An objective of one's own on named outputs: ACGAN's, with one class."""

    def discriminator_loss(self, d: Any, fake: Any, real: Any) -> Tensor:
        """Classify both, and tell them apart."""
        losses = []
        for batch, sign in ((real, -1), (fake, 1)):
            outputs = d(batch)
            labels = torch.arange(len(outputs["classes"]), device=outputs["classes"].device) % 3
            losses.append(F.softplus(sign * outputs["logits"]).mean())
            losses.append(F.cross_entropy(outputs["classes"], labels))
        return torch.stack(losses).sum()

    def generator_loss(self, d: Any, fake: Any, real: Any) -> Tensor:
        """The fakes' logits alone."""
        loss: Tensor = F.softplus(-d(fake)["logits"]).mean()
        return loss


class OwnPenalty:
    """A zero-centred penalty on the fakes, as loops write it."""

    def discriminator_loss(self, d: Any, fake: Any, real: Any) -> Tensor:
        """Differentiate D in the very tensor that came."""
        with torch.enable_grad():
            fake = fake if fake.requires_grad else fake.clone().requires_grad_()
            scores = d(fake)
            (slope,) = torch.autograd.grad(scores.sum(), fake, create_graph=True)
        penalty: Tensor = slope.square().sum(1).mean()
        return penalty + F.softplus(scores).mean() + F.softplus(-d(real)).mean()

    def generator_loss(self, d: Any, fake: Any, real: Any) -> Tensor:
        """Without the penalty."""
        loss: Tensor = F.softplus(-d(fake)).mean()
        return loss


class Dragan:
    """The non-saturating game with DRAGAN's penalty: on reals with noise (Kodali et al. 2017)."""

    def discriminator_loss(self, d: Any, fake: Any, real: Any) -> Tensor:
        """Draw the noise from torch's global generator."""
        noise = 0.5 * real.std() * torch.rand_like(real)
        point = (real + noise).detach().requires_grad_()
        with torch.enable_grad():
            (slope,) = torch.autograd.grad(d(point).sum(), point, create_graph=True)
        penalty: Tensor = (slope.flatten(1).norm(dim=1) - 1).square().mean()
        return penalty + F.softplus(d(fake)).mean() + F.softplus(-d(real)).mean()

    def generator_loss(self, d: Any, fake: Any, real: Any) -> Tensor:
        """Without the penalty."""
        loss: Tensor = F.softplus(-d(fake)).mean()
        return loss


class Kernels(nn.Module):
    """Batch and instance norms by every function that computes them."""

    mean: Tensor
    variance: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.features, self.head = nn.Conv1d(4, 6, 1), nn.Linear(18, 1)
        self.gain, self.bias = nn.Parameter(torch.rand(6) + 0.5), nn.Parameter(torch.zeros(6))
        self.register_buffer("mean", torch.zeros(6))
        self.register_buffer("variance", torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        h = self.features(x)
        affine, statistics = (self.gain, self.bias), (self.mean, self.variance)
        fixed = torch.full_like(self.mean, 0.5), torch.full_like(self.mean, 2.0)
        normalised = [
            F.batch_norm(h, None, None, *affine, True, 0.1, 0.5),
            torch.batch_norm(h, *affine, *statistics, True, 0.1, 0.6, True),
            torch.native_batch_norm(h, self.gain, None, None, None, True, 0.1, 0.7)[0],
            F.instance_norm(h, weight=self.gain, eps=0.8),
            F.instance_norm(h, *fixed, None, None, False),
            torch.instance_norm(h, *affine, None, None, True, 0.1, 0.9, True),
        ]
        output: Tensor = self.head(torch.tanh(torch.stack(normalised)).mean(0).flatten(1))
        return output
