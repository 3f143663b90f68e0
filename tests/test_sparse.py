"""Sparse matrices, such as a graph's: in a batch or in D, with what a dense one would give."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import unroll
from tests.settings import DEVICE, randn
from tests.test_check_step import plain
from unroll import UnrolledGeneratorLoss

NODES = 6


class Graph(nn.Module):
    """A D of a graph's nodes, with its matrix from the batch or, where given, of its own."""

    def __init__(self, matrix: Tensor | None = None) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 1)
        self.register_buffer("matrix", matrix)
        self.to(DEVICE, torch.float64)

    def forward(self, x: Tensor, matrix: Tensor | None = None) -> Tensor:
        if matrix is None:
            matrix = self.get_buffer("matrix")
        output: Tensor = matrix @ self.second(torch.tanh(matrix @ self.first(x)))
        return output


def dense() -> Tensor:
    generator = torch.Generator().manual_seed(3)
    matrix = torch.rand(NODES, NODES, generator=generator, dtype=torch.float64)
    return (matrix * (matrix > 0.5)).to(DEVICE)


FORMATS: dict[str, Callable[[Tensor], Tensor]] = {
    "coo": Tensor.to_sparse,
    "csr": Tensor.to_sparse_csr,
}


@pytest.fixture(params=FORMATS)
def sparse(request: pytest.FixtureRequest) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch: CSR is in beta state
        return FORMATS[request.param](dense())


def found(d: nn.Module, fake: Tensor, real: Tensor, given: Any, **options: Any) -> list[Tensor]:
    """Return f_K and its gradient."""
    optimizer = torch.optim.Adam(d.parameters(), lr=0.01)
    loss = UnrolledGeneratorLoss(d, optimizer, unroll_steps=3, **options)
    fake = fake.clone().requires_grad_()
    value = loss((fake, *given), (real, *given))
    return [value.detach(), *torch.autograd.grad(value, fake)]


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"checkpoint": True}, {"stop_gradient": True}, {"average": True}]
)
def test_a_sparse_matrix_gives_what_a_dense_one_does(
    sparse: Tensor, own: bool, options: dict[str, Any]
) -> None:
    d, batch = Graph(), (randn(NODES, 4), randn(NODES, 4))
    other = copy.deepcopy(d)
    if own:
        d.matrix, other.matrix = dense(), sparse
    expected = found(d, *batch, [] if own else [dense()], **options)
    actual = found(other, *batch, [] if own else [sparse], **options)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("options", [{}, {"checkpoint": True}, {"stop_gradient": True}])
def test_its_entries_may_be_generated(sparse: Tensor, options: dict[str, Any]) -> None:
    d, x, real = Graph(), randn(NODES, 4), (randn(NODES, 4), dense())
    loss = UnrolledGeneratorLoss(
        d, torch.optim.Adam(d.parameters(), lr=0.01), unroll_steps=2, **options
    )
    gradients: list[Tensor] = []
    for matrix in (dense(), sparse):
        matrix = matrix.requires_grad_()
        gradients += torch.autograd.grad(loss((x, matrix), real), matrix)
    expected, actual = gradients
    there = dense() != 0
    torch.testing.assert_close(actual.to_dense()[there], expected[there], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("own", [False, True])
def test_it_is_not_compiled(sparse: Tensor, own: bool) -> None:
    d, batch = Graph(sparse if own else None), (randn(NODES, 4), randn(NODES, 4))
    given = [] if own else [sparse]
    with pytest.warns(UserWarning, match=r"^compile: .* uncompiled.*: a tensor in .* sparse"):
        actual = found(d, *batch, given, compile=True)
    assert all(map(torch.equal, actual, found(d, *batch, given)))


@pytest.mark.parametrize("own", [False, True])
def test_the_checks_take_it(sparse: Tensor, own: bool) -> None:
    d, fake, real = Graph(sparse if own else None), randn(NODES, 4), randn(NODES, 4)
    given = () if own else (sparse,)
    optimizer = torch.optim.Adam(d.parameters(), lr=0.01)
    loss = UnrolledGeneratorLoss(d, optimizer, unroll_steps=2)
    assert unroll.check_gradients(loss, (fake, *given), (real, *given)).ok
    assert unroll.check_step(loss, plain(loss), (fake, *given), (real, *given)).ok
