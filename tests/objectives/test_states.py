"""Each forward-process method's own loss, as its paper or code writes it, has the gradient of the common form."""

import pytest
import torch
from torch import Tensor

from flowalign.objectives import NFT, AdvantageWeighted, CenteredReward, GroupPreference, Predictions
from tests.helpers.draws import F64, Drawn, Net

OLD, REF, GUARD = Net(1), Net(2), Net(3)
THETA = Net(4)
ROLES = {"old": OLD, "reference": REF, "guard": GUARD}


def check_parallel(ours: Tensor, native: Tensor, factor: float | None = None) -> None:
    cosine = float(torch.cosine_similarity(ours, native, 0))
    assert cosine >= 1 - 1e-12
    assert factor is None or float(native.norm() / ours.norm()) == pytest.approx(factor, rel=1e-9)


def x0_gap(d: Drawn, v: Tensor) -> Tensor:
    """x̂0 − x0, with x̂0 = x − σv."""
    return d.x - d.sigma[:, None] * v - d.x0


def adaptive(gap: Tensor) -> Tensor:
    return gap.square().mean(1) / gap.abs().mean(1).clamp(min=1e-5).detach()


@pytest.mark.parametrize("on", [True, False])
@pytest.mark.parametrize("beta", [1.0, 0.1, 2.0])
def test_nft(on: bool, beta: float) -> None:
    d = Drawn()
    p = (d.ids.advantage / 10 + 0.5).clamp(0, 1)
    old = d.velocity(OLD).detach()

    def loss(v: Tensor) -> Tensor:
        plus, minus = (x0_gap(d, one) for one in ((1 - beta) * old + beta * v, (1 + beta) * old - beta * v))
        size = adaptive if on else lambda gap: gap.square().mean(1)
        return (5 / beta * (p * size(plus) + (1 - p) * size(minus))).mean()

    ours = d.common_form(NFT(beta, on), THETA, {"old": OLD})
    check_parallel(ours, d.gradient(THETA, loss), 1.0)


def test_nft_without_its_weight_is_the_old_residual_with_an_anchor_of_one() -> None:
    """Table: c = g = (2p − 1)/β, κ_old = 1 − g in velocity space, β²σ² of NFT's own loss."""
    d, beta = Drawn(), 0.5
    p = (d.ids.advantage / 10 + 0.5).clamp(0, 1)
    old = d.velocity(OLD).detach()

    def native(v: Tensor) -> Tensor:
        plus, minus = (1 - beta) * old + beta * v, (1 + beta) * old - beta * v
        return ((p * (plus - d.u).square().mean(1) + (1 - p) * (minus - d.u).square().mean(1)) / beta**2).mean()

    objective = AdvantageWeighted(1 / (5 * beta), residual="old", old="old")  # (2p − 1)/β = A/(5β) inside the clip
    check_parallel(d.common_form(objective, THETA, {"old": OLD}, {"old": 1.0}), d.gradient(THETA, native), 1.0)


@pytest.mark.parametrize("weight, power", [("velocity", 0), ("sigma", 1), ("x0", 2)])
def test_awm(weight: str, power: int) -> None:
    """max(−Aρ, −A·clip(ρ)) with a clip range that is never met, and two anchors."""
    d = Drawn()
    old = d.velocity(OLD).detach()

    def loss(v: Tensor) -> Tensor:
        bound = d.sigma**power
        ratio = (bound * (d.error(old) - d.error(v))).exp()
        kl = 0.3 * (v - d.velocity(REF).detach()).square().mean(1) + 1.2 * (
            v - d.velocity(GUARD).detach()
        ).square().mean(1)
        return (-d.ids.advantage * ratio + kl).mean()

    ours = d.common_form(
        AdvantageWeighted(weight=weight, ratio="epg", old="old"), THETA, ROLES, {"reference": 0.3, "guard": 1.2}
    )
    check_parallel(ours, d.gradient(THETA, loss), 1.0)


@pytest.mark.parametrize("clip", [0.05, 0.5])
def test_the_clip_is_that_of_ppo(clip: float) -> None:
    d = Drawn()
    old = d.velocity(OLD).detach()

    def loss(v: Tensor) -> Tensor:
        ratio = (d.error(old) - d.error(v)).exp()
        a = d.ids.advantage
        return torch.maximum(-a * ratio, -a * ratio.clamp(1 - clip, 1 + clip)).mean()

    ours = d.common_form(AdvantageWeighted(ratio="epg", clip=clip, old="old"), THETA, {"old": OLD})
    check_parallel(ours, d.gradient(THETA, loss), 1.0)


def test_ram_and_tilt_matching() -> None:
    d, scale = Drawn(), 100.0
    old, ref = d.velocity(OLD).detach(), d.velocity(REF).detach()
    reward = scale * d.ids.advantage[:, None]

    def code(v: Tensor) -> Tensor:
        return (v - (ref + reward * (d.u - old))).square().mean(1).mean()

    def live(v: Tensor) -> Tensor:
        return (v - (ref + reward * (d.u - v.detach()))).square().mean(1).mean()

    def explicit(v: Tensor) -> Tensor:
        return (v - (old + 0.3 * d.ids.advantage[:, None] * (d.u - old))).square().mean(1).mean()

    def implicit(v: Tensor) -> Tensor:
        share = (0.3 * d.ids.advantage).exp()[:, None]
        return (v - (old + (share - 1) * (d.u - v.detach()))).square().mean(1).mean()

    lagged = AdvantageWeighted(scale, residual="old", old="old")
    check_parallel(d.common_form(lagged, THETA, ROLES, {"reference": 1.0}), d.gradient(THETA, code), 1.0)
    check_parallel(
        d.common_form(AdvantageWeighted(scale), THETA, ROLES, {"reference": 1.0}), d.gradient(THETA, live), 1.0
    )
    step = AdvantageWeighted(0.3, residual="old", old="old")
    check_parallel(d.common_form(step, THETA, ROLES, {"old": 1.0}), d.gradient(THETA, explicit), 1.0)
    d.ids = type(d.ids)(
        (0.3 * d.ids.advantage).exp() - 1, d.ids.group, d.ids.number
    )  # what Exponential gives, less its mean
    found = d.common_form(AdvantageWeighted(), THETA, ROLES, {"old": 1.0})
    d = Drawn()
    check_parallel(found, d.gradient(THETA, implicit), 1.0)


def test_live_ram_is_awm_with_the_inverse_anchor() -> None:
    """R = A/κ: factor 1/κ."""
    d, kappa = Drawn(), 0.01
    awm = d.common_form(AdvantageWeighted(), THETA, ROLES, {"reference": kappa})
    ram = d.common_form(AdvantageWeighted(1 / kappa), THETA, ROLES, {"reference": 1.0})
    check_parallel(awm, ram, 1 / kappa)


def test_nft_with_a_small_anchor_is_ram_with_a_multiplier_of_ten_thousand_in_x0_space() -> None:
    """At θ = old, adaptive off: R_eff = 5σ²(2p − 1)/1e-4."""
    d = Drawn()
    nft = d.common_form(NFT(1.0, False), OLD, ROLES, {"reference": 1e-4})
    ram = d.common_form(AdvantageWeighted(1e4, "x0", "old", old="old"), OLD, ROLES, {"reference": 1.0})
    check_parallel(nft, ram, 1e4)


@pytest.mark.parametrize("weight", ["adaptive", "x0", "velocity", "elbo"])
def test_elbo_pg(weight: str) -> None:
    d = Drawn()

    def bound(v: Tensor) -> Tensor:
        if weight in ("adaptive", "x0"):
            gap = x0_gap(d, v)
            return -(adaptive(gap) if weight == "adaptive" else gap.square().mean(1))
        return -d.error(v) * (1 if weight == "velocity" else (1 - d.sigma) / (d.sigma + 1e-3))

    old, a = bound(d.velocity(OLD)).detach(), d.ids.advantage

    def epg(v: Tensor) -> Tensor:
        gain = (bound(v) - old).detach()
        return -(gain.exp() * a * bound(v)).mean()

    def pepg(v: Tensor) -> Tensor:
        gain = (bound(v) - old).detach()
        return -(gain.exp() * (a - gain) * bound(v)).mean()

    def par(v: Tensor) -> Tensor:
        gain = bound(v) - old
        return (0.5 * gain.detach().exp() * (a - gain).square()).mean()

    for ratio, losses in (("epg", [epg]), ("pepg", [pepg, par])):
        ours = d.common_form(AdvantageWeighted(weight=weight, ratio=ratio, old="old"), THETA, {"old": OLD})
        for loss in losses:
            check_parallel(ours, d.gradient(THETA, loss), 1.0)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("weight", ["velocity", "adaptive"])
def test_dgpo(shared: bool, weight: str) -> None:
    """The gradient of −log σ(−z) over β/G, summed over the two draws; the guard cuts members that have moved too far."""
    d, beta = Drawn(shared), 1.7

    def size(v: Tensor) -> Tensor:
        return d.error(v) if weight == "velocity" else adaptive(x0_gap(d, v))

    ref = size(d.velocity(REF)).detach()

    def loss(v: Tensor) -> Tensor:
        gap = (d.ids.advantage * (size(v) - ref)).reshape(2, 2, 4).sum(2)
        return -torch.nn.functional.logsigmoid(-beta / 4 * gap).mean()

    objective = GroupPreference(beta, weight)
    check_parallel(d.common_form(objective, THETA, ROLES), d.gradient(THETA, loss), beta)
    guarded = GroupPreference(beta, "velocity", guard="guard", clip=0.2)
    ratio = (d.error(d.velocity(GUARD)) - d.error(d.velocity(THETA))).exp()
    kept = ~(((d.ids.advantage > 0) & (ratio > 1.2)) | ((d.ids.advantage < 0) & (ratio < 0.8)))
    assert 0 < int(kept.sum()) < len(kept)
    found = Predictions(d.velocity(THETA), {n: d.velocity(r) for n, r in ROLES.items()}, d.u, d.sigma)
    c = guarded.coefficients(found, d.ids.advantage, torch.ones(16)).c
    assert torch.equal(c != 0, kept)


def test_dpo_is_the_preference_of_a_pair() -> None:
    """−log σ(−(β/2)[(ℓ_w − ℓ_w^ref) − (ℓ_l − ℓ_l^ref)]), mean over pairs and draws."""
    d, beta = Drawn(), 1.3
    d.ids = type(d.ids)(
        torch.tensor([1.0, -1.0] * 8, dtype=F64), torch.arange(4).repeat_interleave(2).repeat(2), d.ids.number
    )
    ref = d.error(d.velocity(REF)).detach()

    def loss(v: Tensor) -> Tensor:
        winner, loser = (d.error(v) - ref).reshape(-1, 2).T
        return -torch.nn.functional.logsigmoid(-beta / 2 * (winner - loser)).mean()

    native = d.gradient(THETA, loss)
    check_parallel(d.common_form(GroupPreference(beta), THETA, ROLES), native, beta)
    assert float(loss(d.velocity(REF)).detach()) == pytest.approx(0.6931471805599453)
    d.ids = type(d.ids)(-d.ids.advantage, d.ids.group, d.ids.number)
    swapped = d.common_form(GroupPreference(beta), REF, ROLES)
    d.ids = type(d.ids)(-d.ids.advantage, d.ids.group, d.ids.number)
    torch.testing.assert_close(swapped, -d.common_form(GroupPreference(beta), REF, ROLES))


@pytest.mark.parametrize("weight", ["velocity", "adaptive_velocity"])
def test_crd(weight: str) -> None:
    """R = −((v − u)²/⟨|v − u|⟩ − the same of old): the weight is that of the velocity's own error, not of x̂0's."""
    d, beta = Drawn(), 0.8

    def size(v: Tensor) -> Tensor:
        return d.error(v) if weight == "velocity" else adaptive(v - d.u)

    old, p = size(d.velocity(OLD)).detach(), (d.ids.advantage / 10 + 0.5).clamp(0, 1)

    def centered(values: Tensor) -> Tensor:
        cells = values.reshape(2, 2, 4)
        return (cells - cells.mean(2, keepdim=True).detach()).flatten()

    def loss(v: Tensor) -> Tensor:
        return ((beta * centered(old - size(v)) - centered(p)).square() * 5 / beta).mean()

    assert CenteredReward().weight == "adaptive_velocity"
    ours = d.common_form(CenteredReward(beta, weight), THETA, {"old": OLD})
    check_parallel(ours, d.gradient(THETA, loss), 1.0)


EVERY = [
    NFT(1.0, False), NFT(0.3), AdvantageWeighted(), AdvantageWeighted(residual="old", old="old"),
    AdvantageWeighted(weight="x0", ratio="epg", old="old"), AdvantageWeighted(ratio="pepg", old="old"), GroupPreference(),
    CenteredReward(),
]  # fmt: skip


@pytest.mark.parametrize("objective", EVERY, ids=str)
def test_where_all_are_equally_good_nothing_moves(objective) -> None:
    """At unchanged weights: θ = old = reference."""
    d = Drawn()
    same = dict.fromkeys(ROLES, THETA)
    assert float(d.common_form(objective, THETA, same).norm()) > 1e-3
    d.ids = type(d.ids)(torch.zeros(16, dtype=F64), d.ids.group, d.ids.number)
    assert float(d.common_form(objective, THETA, same).norm()) < 1e-14


@pytest.mark.parametrize("objective", EVERY, ids=str)
def test_members_of_a_group_may_stand_in_any_order(objective) -> None:
    d = Drawn()
    before = d.common_form(objective, THETA, ROLES)
    order = torch.tensor([3, 1, 0, 2, 6, 7, 5, 4])
    order = torch.cat([order, order + 8])
    for name in ("x", "x0", "u", "sigma"):
        setattr(d, name, getattr(d, name)[order])
    d.ids = type(d.ids)(d.ids.advantage[order], d.ids.group[order], d.ids.number[order])
    torch.testing.assert_close(d.common_form(objective, THETA, ROLES), before)


@pytest.mark.parametrize("objective", EVERY, ids=str)
def test_the_stated_curvature_is_the_sum_of_the_coefficients(objective) -> None:
    """At unchanged weights, where w = 1: for NFT at σ = 1 without its adaptive weight."""
    d = Drawn()
    d.sigma = torch.ones_like(d.sigma)
    v = d.velocity(THETA).detach()
    found = Predictions(v, dict.fromkeys(ROLES, v), v - torch.ones_like(v), d.sigma)  # ⟨|v − u|⟩ = 1: adaptive weight 1
    values = objective.value(found)
    at = objective.coefficients(found, d.ids.advantage, objective.couple(values, d.ids))
    total = at.c + sum(at.kappa.values(), torch.zeros_like(at.c))
    stated = objective.curvature(d.ids.advantage)
    torch.testing.assert_close(total, stated)
