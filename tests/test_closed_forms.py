"""Members against what is known exactly: closed forms, expectations over draws, and the library pytorch_optimizer."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.optim.lr_scheduler import CosineAnnealingLR

from noisysam import optim
from noisysam.core.network import Net
from noisysam.core.objective import Objective
from noisysam.core.task import Task
from noisysam.optim import OPTIMIZERS, SharpnessAware
from noisysam.optim.sam_sga import SAMSGA
from noisysam.optim.universal import Universal


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


W = vector(0.8, -0.5, 1.1, 0.4)
NONE, NO_MATRIX = torch.zeros(4, dtype=torch.float64), torch.zeros(4, 4, dtype=torch.float64)


@dataclass
class Polynomial:
    """L(w) = b'w + w'Aw / 2 + sum c w^3 + sum a w^4 of four weights, its derivatives written out."""

    b: Tensor = NONE
    matrix: Tensor = NO_MATRIX
    c: Tensor = NONE
    a: Tensor = NONE

    def loss(self, w: Tensor) -> Tensor:
        return self.b @ w + w @ self.matrix @ w / 2 + self.c @ w**3 + self.a @ w**4

    def gradient(self, w: Tensor) -> Tensor:
        return self.b + self.matrix @ w + 3 * self.c * w**2 + 4 * self.a * w**3

    def hessian(self, w: Tensor) -> Tensor:
        return self.matrix + torch.diag(6 * self.c * w + 12 * self.a * w**2)

    def third(self, w: Tensor) -> Tensor:
        """Third derivative by each weight (those by different ones are zero), which is the trace's gradient."""
        return 6 * self.c + 24 * self.a * w


B = vector(0.3, -0.2, 0.1, 0.4)
A = torch.tensor(
    [[2.0, 0.5, 0.0, -0.3], [0.5, 1.0, 0.2, 0.0], [0.0, 0.2, 1.5, 0.4], [-0.3, 0.0, 0.4, 0.8]], dtype=torch.float64
)
QUADRATIC = Polynomial(B, A)
CUBIC = Polynomial(B, A, c=vector(0.3, -0.2, 0.25, 0.1))
QUARTIC = Polynomial(a=vector(0.5, 0.8, 0.3, 1.0))
FULL = Polynomial(B, A, c=vector(0.3, -0.2, 0.25, 0.1), a=vector(0.1, 0.2, 0.3, 0.2))


def gradients(name: str | type[SharpnessAware], f: Polynomial, steps: int = 1, **options: Any) -> Tensor:
    """What a member's steps at W step with, (steps, 4): a learning rate of zero keeps the weights there. Draws come
    from one stream."""
    cls = OPTIMIZERS[name] if isinstance(name, str) else name
    w = W.clone().requires_grad_()
    optimizer = cls([w], lr=0.0, momentum=0.0, **options)
    optimizer.generator = torch.Generator().manual_seed(0)

    def closure() -> Tensor:
        w.grad = f.gradient(w.detach())
        return f.loss(w.detach())

    found = []
    for _ in range(steps):
        optimizer.step(closure)
        assert w.grad is not None
        found.append(w.grad.clone())
    assert torch.equal(w, W)
    return torch.stack(found)


def assert_mean(draws: Tensor, expected: Tensor, *wrong: Tensor) -> None:
    """The mean is within four standard errors of what is expected, in each component, and outside of them of what
    would be wrong."""
    mean, error = draws.mean(0), draws.std(0) / math.sqrt(len(draws))
    assert ((mean - expected).abs() <= 4 * error).all(), (mean - expected) / error
    for value in wrong:
        assert ((mean - value).abs() > 4 * error).all(), (mean - value) / error


def close(left: Tensor, right: Tensor, rtol: float = 1e-10, atol: float = 1e-12) -> None:
    torch.testing.assert_close(left, right, rtol=rtol, atol=atol)


# the universal class


@pytest.mark.parametrize(("antithetic", "n"), [(False, 2), (False, 4), (True, 4)])
def test_frob_sam_of_a_quadratic_in_expectation(antithetic: bool, n: int) -> None:
    """Var(d) = |g|^2 / rho^2 + |H|^2 / 2, whose second part is constant: the mean step is g + lam H g, at any rho."""
    g, hg = QUADRATIC.gradient(W), A @ QUADRATIC.gradient(W)
    draws = gradients("frob-sam", QUADRATIC, 1000, n=n, antithetic=antithetic, lam=0.5, rho=0.3)
    assert_mean(draws, g + 0.5 * hg, g, g + hg)


@pytest.mark.parametrize("antithetic", [False, True])
def test_frob_sam_of_a_quartic_in_expectation(antithetic: bool) -> None:
    """L = sum a w^4. By E t^2, t^4, t^6, t^8 = 1, 3, 15, 105 the variance of each weight's part in L(w + rho t) is
    a^2 (16 rho^2 w^6 + 168 rho^4 w^4 + 384 rho^6 w^2 + 96 rho^8); the step adds lam / (2 rho^2) of its gradient.
    In it 48 w^5 is Hg, and 144 rho^2 w^3 the gradient of the Frobenius norm, |H|^2 / 4."""
    rho, lam, g = 0.4, 0.5, QUARTIC.gradient(W)
    square = QUARTIC.a**2
    expected = lam * square * (48 * W**5 + 336 * rho**2 * W**3 + 384 * rho**4 * W)
    draws = gradients("frob-sam", QUARTIC, 2000, n=4, antithetic=antithetic, lam=lam, rho=rho)
    assert_mean(draws, g + expected, g, g + 2 * expected, g + lam * square * 48 * W**5)


def test_antithetic_draws_cancel_odd_terms() -> None:
    """On a quadratic Trace-SAM adds lam rho H t: pairs of t and -t leave nothing. On a quartic they leave half the
    third derivative times rho^2 t^2, and no more."""
    pairs = gradients("trace-sam", QUADRATIC, 5, n=2, rho=0.1, antithetic=True)
    single = gradients("trace-sam", QUADRATIC, 5, n=2, rho=0.1)
    close(pairs, QUADRATIC.gradient(W).expand(5, 4))
    assert (single.std(0) > 0.01).all()

    t = torch.randn(4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = gradients("trace-sam", QUARTIC, n=2, rho=0.1, lam=2.0, antithetic=True)[0]
    close(found, QUARTIC.gradient(W) + 2 * 0.1**2 * QUARTIC.third(W) * t**2 / 2)


def of_pairs(d: Tensor) -> Tensor:
    """Var(d) / 2 from pairs of t and -t: the even and the odd part are not correlated, and the odd one's mean is 0."""
    even, odd = (d[::2] + d[1::2]) / 2, (d[::2] - d[1::2]) / 2
    return (((even - even.mean()) ** 2).sum() / (len(even) - 1) + (odd**2).mean()) / 2


SHARPNESS: dict[str, Callable[[Tensor], Tensor]] = {
    "trace-sam": lambda d: d.mean(),
    "det-sam": lambda d: (-d).exp().mean() ** -2,
    "det-sam released": lambda d: (-d / 2).exp().mean() ** -2,
    "frob-sam": lambda d: ((d - d.mean()) ** 2).sum() / (len(d) - 1) / 2,
}


@pytest.mark.parametrize("antithetic", [False, True])
@pytest.mark.parametrize("kind", SHARPNESS)
def test_universal_members_by_finite_differences(kind: str, antithetic: bool) -> None:
    """The step's gradient is that of L + lam rho^2 R, for the same draws."""
    name, _, form = kind.partition(" ")
    sharpness = of_pairs if antithetic and name == "frob-sam" else SHARPNESS[kind]
    options: dict[str, Any] = {"form": form} if form else {}
    stream, t = torch.Generator().manual_seed(0), []
    rho, lam = 0.5, 0.8
    for _ in range(2 if antithetic else 4):
        if name == "det-sam":
            options["half"] = 0.6
            t.append((2 * torch.rand(4, generator=stream, dtype=torch.float64) - 1) * 0.6)
        else:
            t.append(torch.randn(4, generator=stream, dtype=torch.float64))
        t.extend([-t[-1]] if antithetic else [])

    def value(w: Tensor) -> Tensor:
        d = torch.stack([(FULL.loss(w + rho * each) - FULL.loss(w)) / rho**2 for each in t])
        return FULL.loss(w) + lam * rho**2 * sharpness(d)

    steps = 1e-5 * torch.eye(4, dtype=torch.float64)
    expected = torch.stack([(value(W + s) - value(W - s)) / 2e-5 for s in steps])
    found = gradients(name, FULL, n=4, rho=rho, lam=lam, antithetic=antithetic, **options)[0]
    close(found, expected, rtol=1e-7, atol=1e-8)
    assert ((found - FULL.gradient(W)).abs() > 1e-3).all(), "the sharpness must be seen"


class ByMoments(Universal):
    """Frob-SAM as a user may write it: phi of two moments, here with the correction of the sample variance for n=4."""

    name, source, revision = "by-moments", "this test", 1

    def phi(self, mean: Tensor) -> Tensor:
        return (mean[1] - mean[0] ** 2) / 2 * 4 / 3

    def psi(self, d: Tensor) -> Tensor:
        return torch.stack([d, d**2], 1)


class Signs(Universal):
    """The trace by draws of +1 and -1."""

    name, source, revision = "signs", "this test", 1

    def draw(self) -> list[Tensor]:
        return [t.sign() for t in self.noise()]


def test_universal_class_of_a_user() -> None:
    """A class of phi, psi and a draw works without being registered. Signs see no variance in t^2: in pairs, the step
    is g + lam rho^2 / 2 of the trace's gradient whatever is drawn."""
    settings: dict[str, Any] = {"n": 4, "rho": 0.3, "lam": 0.7}
    close(gradients(ByMoments, FULL, 3, **settings), gradients("frob-sam", FULL, 3, **settings), rtol=1e-9)
    found = gradients(Signs, FULL, 3, **{**settings, "antithetic": True})
    close(found, (FULL.gradient(W) + 0.7 * 0.3**2 / 2 * FULL.third(W)).expand(3, 4))
    assert "by-moments" not in OPTIMIZERS
    assert "signs" not in OPTIMIZERS


# CR-SAM


def unit(v: Tensor) -> Tensor:
    return v / v.norm()


def sam_gradient(f: Polynomial, rho: float) -> Tensor:
    return f.gradient(W + rho * unit(f.gradient(W)))


def test_cr_sam_released_along_the_gradient() -> None:
    """g+ + g- - 2g is rho^2 times the third derivative along v, twice; of a polynomial of degree four, exactly. Then
    along v itself it is rho^2 D3 L [v, v, v]."""
    rho, gamma, v = 0.3, 0.7, unit(FULL.gradient(W))
    found = gradients("cr-sam", FULL, form="released", rho=rho, gamma=gamma, beta=0.0, m="batch")[0]
    curvature = (found - sam_gradient(FULL, rho)) / gamma
    close(curvature, rho**2 * FULL.third(W) * v**2)
    close(v @ curvature, rho**2 * (FULL.third(W) * v**3).sum())


def test_cr_sam_released_slope() -> None:
    """On a quadratic g+ - g- is 2 rho Hv and the curvature's change is zero."""
    rho, v = 0.3, unit(QUADRATIC.gradient(W))
    found = gradients("cr-sam", QUADRATIC, form="released", rho=rho, gamma=0.7, beta=0.2, m="batch")[0]
    close(found, sam_gradient(QUADRATIC, rho) + 0.2 * 2 * rho * A @ v)


def test_cr_sam_paper_form_divides_by_the_loss_differences() -> None:
    """Of a cubic (L+ + L- - 2L) / rho^2 is v'Hv exactly, so the curvature's part is D3 L [v, v] / v'Hv. Of a quadratic
    the slope's is Hv / |g|, the gradient of log |g|."""
    rho, v = 0.3, unit(CUBIC.gradient(W))
    found = gradients("cr-sam", CUBIC, rho=rho, gamma=0.7, beta=0.0, floor=1e-6, m="batch")[0]
    close(found, sam_gradient(CUBIC, rho) + 0.7 * CUBIC.third(W) * v**2 / (v @ CUBIC.hessian(W) @ v))

    g = QUADRATIC.gradient(W)
    found = gradients("cr-sam", QUADRATIC, rho=rho, gamma=0.7, beta=0.2, floor=1e-6, m="batch")[0]
    close(found, sam_gradient(QUADRATIC, rho) + 0.2 * A @ g / (g @ g))


def test_cr_sam_floor() -> None:
    """A difference below the floor is divided by the floor; of a negative one there is no logarithm, and no term."""
    rho, v = 0.3, unit(CUBIC.gradient(W))
    found = gradients("cr-sam", CUBIC, rho=rho, gamma=0.7, beta=0.0, floor=5.0, m="batch")[0]
    close(found, sam_gradient(CUBIC, rho) + 0.7 * rho**2 * CUBIC.third(W) * v**2 / 5)
    hill = Polynomial(B, -4 * A, CUBIC.c)
    found = gradients("cr-sam", hill, rho=rho, gamma=0.7, beta=0.0, m="batch")[0]
    close(found, sam_gradient(hill, rho))


def test_cr_sam_released_random_probe_is_the_traces_gradient_in_mean() -> None:
    """v is uniform on the sphere, E v_i^2 = 1 / 4: the curvature's part has mean gamma rho^2 / 4 of grad tr H."""
    rho, gamma = 0.3, 0.7
    draws = gradients(
        "cr-sam", QUARTIC, 1000, form="released", probe="random", rho=rho, gamma=gamma, beta=0.0, m="batch"
    )
    curvature = (draws - sam_gradient(QUARTIC, rho)) / gamma * 4 / rho**2
    assert_mean(curvature, QUARTIC.third(W), 0 * W, QUARTIC.third(W) / 2)


def test_cr_sam_paper_random_probe_is_the_log_traces_gradient_in_mean() -> None:
    """Where H = 2 I, and no fourth derivative, the denominator is 2 rho^2 whatever is drawn: the curvature's part has
    mean gamma grad log tr H, without any remainder."""
    gamma, c = 0.7, CUBIC.c
    f = Polynomial(B, torch.diag(2 - 6 * c * W), c)
    close(f.hessian(W), 2 * torch.eye(4, dtype=torch.float64))
    draws = gradients("cr-sam", f, 1000, probe="random", rho=0.3, gamma=gamma, beta=0.0, floor=1e-6, m="batch")
    curvature = (draws - sam_gradient(f, 0.3)) / gamma
    log_trace = f.third(W) / f.hessian(W).trace()
    assert_mean(curvature, log_trace, 0 * W, log_trace / 2)


# SAM of several ascent steps, of chunks, of logits


@pytest.mark.parametrize("k", [1, 2, 3, 6])
@pytest.mark.parametrize(("sign", "rho"), [(1, 0.6), (-1, 2.0)])
def test_sam_of_several_ascent_steps_on_a_quadratic(k: int, sign: int, rho: float) -> None:
    """Projected ascent in numpy: e <- e + rho g(w + e) / |g(w + e)|, back into the ball of radius rho. On the hill a
    step goes beyond the top and the next one comes back: there e is inside the ball, and stays there."""
    f, b, w = Polynomial(B, sign * A), B.numpy(), W.numpy()
    matrix, e, lengths = f.matrix.numpy(), np.zeros(4), []
    for _ in range(k):
        g = matrix @ (w + e) + b
        e = e + rho * g / np.linalg.norm(g)
        e = e * min(1.0, rho / float(np.linalg.norm(e)))
        lengths.append(float(np.linalg.norm(e)))
    found = gradients("sam", f, rho=rho, ascent_steps=k, m="batch")[0]
    np.testing.assert_allclose(found.numpy(), matrix @ (w + e) + b, rtol=1e-11, atol=1e-12)
    if k > 1:
        assert (found - sam_gradient(f, rho)).norm() > 1e-2
        assert (min(lengths) < 0.9 * rho) == (sign < 0)


class Float64(Net):
    """A Net whose logits stay float64, for comparisons to the last digits."""

    def logits(self, inputs: Tensor, grad: bool, weights: Any = None, forwards: Any = ()) -> Tensor:
        with torch.set_grad_enabled(grad):
            return self.forward(inputs)


def network(*layers: nn.Module, seed: int = 0) -> nn.Module:
    """A network of float64 weights that depend on the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    module = nn.Sequential(*layers).double()
    for p in module.parameters():
        nn.init.normal_(p, std=0.5, generator=generator)
    return module


def two_layers(seed: int = 0) -> nn.Module:
    return network(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3), seed=seed)


def batch(step: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 + step)
    return torch.randn(12, 6, generator=generator).double(), torch.randint(3, (12,), generator=generator)


def flat(module: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def trained(name: str, module: nn.Module, steps: int = 3, **options: Any) -> Tensor:
    """The weights after some steps on objectives of single rows."""
    optimizer = OPTIMIZERS[name](module.parameters(), lr=0.2, **options)
    net = Float64(module)
    for step in range(steps):
        task = Task(0, *batch(step))
        optimizer.step(Objective(net, task, lambda z, t: F.cross_entropy(z, t.labels, reduction="none")))
    return flat(module)


def test_m_sam_of_the_whole_batch_is_sam_bit_for_bit() -> None:
    whole = trained("sam", two_layers(), m="batch", rho=0.3)
    for m in (12, 500):
        assert torch.equal(trained("sam", two_layers(), m=m, rho=0.3), whole)
    assert not torch.equal(trained("sam", two_layers(), m=11, rho=0.3), whole)


@pytest.mark.parametrize("m", [1, 4])
def test_m_sam_by_torch_func(m: int) -> None:
    """The mean over chunks of each one's own SAM gradient, by functional calls under vmap."""
    module, rho, lr = two_layers(), 0.3, 0.2
    x, y = batch()

    def loss(w: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(module, w, (x,)), y)

    def sam(w: dict[str, Tensor], x: Tensor, y: Tensor) -> dict[str, Tensor]:
        g = grad(loss)(w, x, y)
        norm = torch.cat([part.flatten() for part in g.values()]).norm()
        return grad(loss)({k: w[k] + rho * g[k] / norm for k in w}, x, y)

    w = {name: p.detach().clone() for name, p in module.named_parameters()}
    chunks = vmap(sam, (None, 0, 0))(w, x.view(-1, m, 6), y.view(-1, m))
    expected = torch.cat([(w[k] - lr * chunks[k].mean(0)).flatten() for k in w])
    close(trained("sam", module, steps=1, m=m, rho=rho, momentum=0.0), expected)
    assert (expected - trained("sam", two_layers(), steps=1, m="batch", rho=rho)).norm() > 1e-3


@pytest.mark.parametrize("m", ["batch", 5])
def test_logit_sams_of_the_logistic_model(m: Any) -> None:
    """The Jacobian does not depend on the weights: all of SAM is in the loss's derivative. L-SAM is SAM, J-SAM SGD."""
    sam, lsam, jsam = (trained(n, network(nn.Linear(6, 3)), m=m, rho=0.4) for n in ("sam", "l-sam", "j-sam"))
    sgd = trained("sgd", network(nn.Linear(6, 3)))
    close(lsam, sam)
    close(jsam, sgd)
    assert (sam - sgd).norm() > 1e-2
    assert (trained("l-sam", two_layers(), rho=0.4) - trained("sam", two_layers(), rho=0.4)).norm() > 1e-3


# SAM-SGA


P, Q, R = (
    torch.tensor(rows, dtype=torch.float64)
    for rows in ([[2, 0.3], [0.3, 1]], [[1, -1], [0.5, 2]], [[1.5, 0.2], [0.2, 1]])
)
TO_THETA, TO_PHI = vector(0.5, -1.0), vector(-0.3, 0.7)


class Saddle:
    """L(theta, phi) = theta'P theta / 2 + theta'Q phi - phi'R phi / 2 + linear terms, and the two players on it."""

    def __init__(self, rho: float, simultaneous: bool = False) -> None:
        self.theta, self.phi = vector(1.0, 2.0).requires_grad_(), vector(-1.0, 1.5).requires_grad_()
        self.student = optim.SAM([self.theta], lr=0.1, momentum=0.0, rho=rho, m="batch")
        adversary = torch.optim.SGD([self.phi], lr=0.2, maximize=True)
        self.players = SAMSGA(self.student, adversary, simultaneous)

    def loss(self) -> Tensor:
        theta, phi = self.theta, self.phi
        convex, concave = theta @ P @ theta / 2 + TO_THETA @ theta, phi @ R @ phi / 2 - TO_PHI @ phi
        return convex + theta @ Q @ phi - concave

    def step(self) -> float:
        return float(self.players.step(self.loss))

    def distance(self) -> float:
        """To the saddle, where P theta + Q phi + p = 0 and Q' theta - R phi + r = 0."""
        system = torch.cat([torch.cat([P, Q], 1), torch.cat([Q.T, -R], 1)])
        saddle = torch.linalg.solve(system, -torch.cat([TO_THETA, TO_PHI]))
        return float((torch.cat([self.theta, self.phi]).detach() - saddle).norm())


@pytest.mark.parametrize("simultaneous", [False, True])
def test_sam_sga_recursion_in_numpy(simultaneous: bool) -> None:
    game = Saddle(0.5, simultaneous)
    p, q, r, a, b = (t.numpy() for t in (P, Q, R, TO_THETA, TO_PHI))
    theta, phi = game.theta.detach().numpy().copy(), game.phi.detach().numpy().copy()
    for _ in range(3):
        value = theta @ p @ theta / 2 + theta @ q @ phi - phi @ r @ phi / 2 + a @ theta + b @ phi
        g = p @ theta + q @ phi + a
        there = theta + 0.5 * g / np.linalg.norm(g)
        new = theta - 0.1 * (p @ there + q @ phi + a)
        phi = phi + 0.2 * (q.T @ (theta if simultaneous else new) - r @ phi + b)
        theta = new
        assert game.step() == pytest.approx(float(value), rel=1e-12)
        np.testing.assert_allclose(game.theta.detach().numpy(), theta, rtol=1e-12)
        np.testing.assert_allclose(game.phi.detach().numpy(), phi, rtol=1e-12)


def test_sam_sga_orders_differ() -> None:
    """From the first step on in phi, from the second on in theta."""
    alternating, simultaneous = Saddle(0.5), Saddle(0.5, simultaneous=True)
    alternating.step(), simultaneous.step()
    assert torch.equal(alternating.theta, simultaneous.theta)
    assert (alternating.phi - simultaneous.phi).norm() > 1e-2
    alternating.step(), simultaneous.step()
    assert (alternating.theta - simultaneous.theta).norm() > 1e-3


@pytest.mark.parametrize("simultaneous", [False, True])
def test_sam_sga_converges_to_the_saddle(simultaneous: bool) -> None:
    """Exactly without a radius; with one, up to steps of lr rho |P|, which a radius that falls takes away."""
    plain, fixed, falling = (Saddle(rho, simultaneous) for rho in (0.0, 0.2, 0.2))
    for step in range(250):
        falling.student.param_groups[0]["rho"] = 0.2 / (1 + step)
        for game in (plain, fixed, falling):
            game.step()
    largest = float(torch.linalg.matrix_norm(P, 2))
    assert plain.distance() < 1e-9
    assert 1e-3 < fixed.distance() < 0.1 * 0.2 * largest
    assert falling.distance() < 0.1 * 0.2 / 250 * largest


def test_sam_sga_adversary_must_ascend() -> None:
    game = Saddle(0.1)
    with pytest.raises(ValueError, match="maximize=True"):
        SAMSGA(game.student, torch.optim.SGD([game.phi], lr=0.1))


# the library pytorch_optimizer


RULE: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}


@pytest.fixture
def library() -> Any:
    """Its norms are float32, which sets the tolerance. Before 4.1 its FriendlySAM averaged what it had subtracted."""
    module = pytest.importorskip("pytorch_optimizer")
    if tuple(int(part) for part in version("pytorch_optimizer").split(".")[:2]) < (4, 1):
        pytest.skip("pytorch_optimizer before 4.1")
    return module


def closure_of(module: nn.Module, optimizer: Any, x: Tensor, y: Tensor) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(module(x), y)
        loss.backward()
        return loss

    return closure


def path(
    module: nn.Module, optimizer: Any, first: bool = False, schedule: Any = None, steps: int = 8, begin: int = 0
) -> Tensor:
    """The weights after each step, (steps, weights). ``first``: its gradient at w is to be there before a step."""
    found = []
    for step in range(begin, begin + steps):
        closure = closure_of(module, optimizer, *batch(step))
        if first:
            closure()
        optimizer.step(closure)
        if schedule is not None:
            schedule.step()
        found.append(flat(module))
    return torch.stack(found)


def agree(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=2e-7)


def test_asam_against_pytorch_optimizer(library: Any) -> None:
    """Its adaptive SAM scales every tensor, and by |w| alone."""
    left, right = two_layers(), two_layers()
    ours = optim.ASAM(left.named_parameters(), rho=0.5, eta=0.0, rule="all", m="batch", **RULE)
    theirs = library.SAM(right.parameters(), torch.optim.SGD, rho=0.5, adaptive=True, **RULE)
    found = path(left, ours)
    agree(found, path(right, theirs, first=True))
    other = two_layers()
    biases_not_scaled = optim.ASAM(other.named_parameters(), rho=0.5, eta=0.0, m="batch", **RULE)
    assert (path(other, biases_not_scaled) - found).abs().max() > 1e-3


def test_gsam_against_pytorch_optimizer(library: Any) -> None:
    """Under a cosine from 0.1 to 0 the radius falls from 0.5 to 0.1."""
    left, right = two_layers(), two_layers()
    ours = optim.GSAM(left.parameters(), rho=0.5, rho_min=0.1, alpha=0.4, m="batch", **RULE)
    found = path(left, ours, schedule=CosineAnnealingLR(ours, T_max=8))

    base = torch.optim.SGD(right.parameters(), **RULE)
    schedule = CosineAnnealingLR(base, T_max=8)
    radius = library.ProportionScheduler(schedule, max_lr=0.1, min_lr=0.0, max_value=0.5, min_value=0.1)
    theirs = library.GSAM(right.parameters(), base, right, radius, alpha=0.4)
    for step in range(8):
        theirs.set_closure(F.cross_entropy, *batch(step))
        theirs.step()
        agree(found[step], flat(right))
        schedule.step()
        theirs.update_rho_t()
    assert theirs.rho_t == pytest.approx(0.1)


@pytest.mark.parametrize("decouple", [True, False])
def test_wsam_against_pytorch_optimizer(library: Any, decouple: bool) -> None:
    left, right = two_layers(), two_layers()
    ours = optim.WSAM(left.parameters(), rho=0.3, gamma=0.8, decouple=decouple, m="batch", **RULE)
    theirs = library.WSAM(right, right.parameters(), torch.optim.SGD, rho=0.3, gamma=0.8, decouple=decouple, **RULE)
    agree(path(left, ours), path(right, theirs))


def test_looksam_against_pytorch_optimizer(library: Any) -> None:
    """Of one tensor the two agree. Of two they part at the first reuse: it projects and scales each tensor for itself,
    the paper's Algorithm 1, which we follow, the one vector of all weights."""
    for bias, equal in ((False, 8), (True, 1)):
        left, right = (network(nn.Linear(6, 3, bias=bias)) for _ in range(2))
        ours = optim.LookSAM(left.parameters(), rho=0.5, interval=3, alpha=0.7, m="batch", **RULE)
        theirs = library.LookSAM(right.parameters(), torch.optim.SGD, rho=0.5, k=3, alpha=0.7, **RULE)
        found, other = path(left, ours), path(right, theirs, first=True)
        agree(found[:equal], other[:equal])
        assert not bias or (found[equal] - other[equal]).abs().max() > 1e-3


def test_fsam_against_pytorch_optimizer(library: Any) -> None:
    """It has the released form: what it takes out is the mean before this step, which begins as the first gradient.

    The paper's mean begins at zero and has this step's gradient in it. At sigma = 1 its direction is lambda (g - m)
    with the m before: the released one if m is the same. So the first step agrees, the second does not, and from the
    released mean on they agree again."""
    settings: dict[str, Any] = {"rho": 0.5, "sigma": 1.0, "m": "batch", **RULE}
    left, right = two_layers(), two_layers()
    released = optim.FSAM(left.parameters(), form="released", decay=0.6, **settings)
    theirs = library.FriendlySAM(right.parameters(), torch.optim.SGD, rho=0.5, sigma=1.0, lmbda=0.6, **RULE)
    found = path(right, theirs, first=True)
    agree(path(left, released), found)

    module = two_layers()
    paper = optim.FSAM(module.parameters(), decay=0.6, **settings)
    departs = path(module, paper)
    agree(departs[0], found[0])
    assert (departs[1] - found[1]).abs().max() > 1e-3

    module = two_layers()
    paper = optim.FSAM(module.parameters(), decay=0.6, **settings)
    path(module, paper, steps=1)
    paper.memory["mean"] = [m / (1 - 0.6) for m in paper.memory["mean"]]  # the first gradient itself
    agree(path(module, paper, steps=7, begin=1), found[1:])


@pytest.mark.parametrize("sigma", [0.5, 1.0])
def test_fsam_released_at_other_sigma(library: Any, sigma: float) -> None:
    left, right = two_layers(), two_layers()
    ours = optim.FSAM(left.parameters(), form="released", rho=0.5, sigma=sigma, decay=0.9, m="batch", **RULE)
    theirs = library.FriendlySAM(right.parameters(), torch.optim.SGD, rho=0.5, sigma=sigma, lmbda=0.9, **RULE)
    agree(path(left, ours), path(right, theirs, first=True))
