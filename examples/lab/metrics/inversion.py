"""Inference by optimisation, Eq. 13-14: the latent point whose image is nearest to a target.

Every point has its own `torch.optim.LBFGS`, with its own line search and history. Only the
generator is batched: each optimizer runs in a thread that waits at every evaluation of its closure
until all others wait too, and then one forward and backward pass answers them all.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue

import torch
from torch import Tensor, nn

HISTORY = 10
EVALUATIONS = 4  # for a step of L-BFGS, at most on average
Evaluate = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # (rows, points): losses, gradients


def minimise(evaluate: Evaluate, starts: Tensor, *, steps: int) -> tuple[Tensor, Tensor]:
    """Minimise functions of one point each, all at once.

    Args:
        evaluate: Given the rows of `starts` that are meant, `(m,)`, and points, `(m, n)`, returns
            their losses, `(m,)`, and gradients, `(m, n)`.
        starts: The starting points, `(N, n)`.
        steps: Iterations of L-BFGS at most, of every point.

    Returns:
        The points reached, `(N, n)`, and their losses, `(N,)`.
    """
    points = starts.detach().clone()
    questions: SimpleQueue[tuple[int, Tensor | None]] = SimpleQueue()
    answers: list[SimpleQueue[tuple[Tensor, Tensor] | None]] = [SimpleQueue() for _ in points]

    def descend(row: int) -> None:
        point = points[row].clone().requires_grad_()
        optimizer = torch.optim.LBFGS(
            [point],
            max_iter=steps,
            max_eval=EVALUATIONS * steps,
            history_size=HISTORY,
            line_search_fn="strong_wolfe",
        )

        def closure() -> Tensor:
            questions.put((row, point.detach().clone()))
            answer = answers[row].get()
            if answer is None:
                raise RuntimeError("the evaluation of the other points failed")
            loss, point.grad = answer
            return loss

        try:
            optimizer.step(closure)
            points[row] = point.detach()
        finally:
            questions.put((row, None))

    with ThreadPoolExecutor(len(points)) as pool:
        threads = [pool.submit(descend, row) for row in range(len(points))]
        waiting = len(points)
        try:
            while waiting:
                asked = sorted((questions.get() for _ in range(waiting)), key=lambda pair: pair[0])
                open_ones = [(row, point) for row, point in asked if point is not None]
                waiting = len(open_ones)
                if open_ones:
                    rows = torch.tensor([row for row, _ in open_ones])
                    found = evaluate(rows, torch.stack([point for _, point in open_ones]))
                    for row, loss, gradient in zip(rows.tolist(), *found, strict=True):
                        answers[row].put((loss, gradient))
        finally:
            for answer in answers:
                answer.put(None)  # nobody is left waiting
        for thread in threads:
            thread.result()
    losses, _ = evaluate(torch.arange(len(points)), points)
    return points, losses


def reconstruct(
    generator: nn.Module, targets: Tensor, starts: Tensor, *, steps: int, batch_size: int = 256
) -> tuple[Tensor, Tensor]:
    """Return the best reconstruction of every target, and its mean squared error over pixels."""
    device = targets.device
    count, tries, size = starts.shape
    of = torch.arange(count).repeat_interleave(tries)  # which target a point is for
    points, losses = [], []
    for some in torch.arange(count * tries).split(batch_size):
        goals = targets[of[some]]

        def evaluate(rows: Tensor, z: Tensor, goals: Tensor = goals) -> tuple[Tensor, Tensor]:
            z = z.to(device).requires_grad_()
            errors = (generator(z) - goals[rows]).square().sum(dim=(1, 2, 3))  # Eq. 13
            (gradient,) = torch.autograd.grad(errors.sum(), z)
            return errors.detach().cpu(), gradient.cpu()

        found, errors = minimise(evaluate, starts.flatten(0, 1)[some].cpu(), steps=steps)
        points.append(found)
        losses.append(errors)
    errors = torch.cat(losses).nan_to_num(torch.inf)  # a descent that failed is no best one
    best, winner = errors.view(count, tries).min(dim=1)
    nearest = torch.cat(points).view(count, tries, size)[torch.arange(count), winner]
    with torch.no_grad():
        images = torch.cat([generator(z.to(device)).cpu() for z in nearest.split(batch_size)])
    return images, best / targets[0].numel()
