"""Turn a target into a plan's record of it, and back."""

from __future__ import annotations

from collections.abc import Sequence

from ditfastattn.core.errors import ConfigError
from ditfastattn.passes.plan.calibration import Measured, PlannedTarget
from ditfastattn.passes.plan.schema import Plan
from ditfastattn.runtime.search.judge.pretrained import ClipScore
from ditfastattn.runtime.search.judge.targets import Target

_BUILT_IN = {  # by name and whether more is better
    ("ssim", True): Target.min_ssim,
    ("psnr", True): Target.min_psnr,
    ("lpips", False): Target.max_lpips,
    ("flip", False): Target.max_flip,
    ("feature-distance", False): Target.max_feature_distance,
    ("clip-score", True): Target.min_clip_score,
    ("speedup", True): Target.min_speedup,
    ("latency", False): Target.max_latency,
    ("threshold", False): Target.threshold,
}


def record_target(target: Target) -> PlannedTarget:
    """Return what a plan keeps of ``target``."""
    model = target.metric.model if isinstance(target.metric, ClipScore) else ""
    return PlannedTarget(
        name=target.name, bound=target.bound, at_least=target.at_least, model=model
    )


def record_values(target: Target, values: Sequence[float]) -> Measured:
    """Return what a plan keeps of the ``values`` of a target's metric, one per image."""
    mean = sum(values) / len(values)
    return Measured(prompts=len(values), mean=mean, worst=target.worst(values))


def target_of(plan: Plan) -> Target | None:
    """Return the target that ``plan`` was searched for; None where it records none.

    Raises:
        ConfigError: the target is a metric of the user's own, which a plan does not hold.
    """
    planned = plan.calibration.target
    return None if planned is None else target_for(planned)


def target_for(planned: PlannedTarget) -> Target:
    """Return the target that ``planned`` records; errors as in ``target_of``."""
    make = _BUILT_IN.get((planned.name, planned.at_least))
    if make is None:
        raise ConfigError(
            "the plan's target is a metric of your own, which a plan does not hold",
            where="plan.calibration.target",
            got=planned.name,
            expected="a function of the dense and the planned images",
            remedy="name it with --metric package.module:function, or choose another target",
        )
    if planned.model:
        return Target.min_clip_score(planned.bound, clip_model=planned.model)
    return make(planned.bound)


def metric_bound(plan: Plan) -> tuple[float | None, float | None]:
    """Return the least and the greatest value that a user's own metric may have: one is None.

    Raises:
        ConfigError: the plan records no bound of such a metric.
    """
    planned = plan.calibration.target
    if planned is None or (planned.name, planned.at_least) in _BUILT_IN:
        raise ConfigError(
            "the plan holds no bound of a metric of your own",
            where="plan.calibration.target",
            got="none" if planned is None else planned.name,
            remedy="give the bound too: --at-least where more is better, else --at-most",
        )
    return (planned.bound, None) if planned.at_least else (None, planned.bound)
