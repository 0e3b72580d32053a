"""Who teaches whom: the teachers of a distillation, and which of them a prompt has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from flowalign.data import PromptRecord
from flowalign.models.guidance import classifier_free_rows
from flowalign.models.roles import Role
from flowalign.objectives import Match
from flowalign.rollouts.task import Rollout
from flowalign.rollouts.unscored import Sampler


@dataclass(frozen=True)
class Teacher:
    """A role that teaches. guidance_scale: its velocities' own; None: that of the rollout. A guided teacher of a student without
    guidance is guidance distillation."""

    guidance_scale: float | None = None

    def __post_init__(self) -> None:
        if self.guidance_scale is not None and not 1 <= self.guidance_scale < float("inf"):
            raise ValueError(
                f"got guidance_scale={self.guidance_scale}; expected a number from 1 (no guidance), or null"
            )

    def scale(self, rollout: Rollout) -> float:
        """Its guidance scale."""
        return rollout.guidance_scale if self.guidance_scale is None else self.guidance_scale


@dataclass(frozen=True)
class Route:
    """The teacher of a prompt by its label: metadata `key` of the prompt -> a name of trainer.teachers."""

    key: str
    teachers: dict[str, str]

    def of(self, record: PromptRecord) -> str:
        """ValueError for a prompt whose label has no teacher."""
        label = record.metadata.get(self.key)
        if str(label) not in self.teachers or label is None:
            raise ValueError(
                f"got {self.key}={label!r} of prompt {record.uid} ({record.prompt!r}); expected one of {sorted(self.teachers)}, the "
                "labels of trainer.route.teachers: add a teacher for it, or mend the prompt"
            )
        return self.teachers[str(label)]


@dataclass(frozen=True)
class ManifoldAnchor:
    """Manifold anchor regularization (Flow-OPD 2605.08063): λ·w·⟨(v − v_a)²⟩ at all states of the student, whoever teaches
    there; λ = scale. role: an aesthetic teacher (paper) or the base model (its code). The paper's λ and w are not public.

    Where both pull in the velocity, the optimum is (w_m·v_m + λ·w·v_a) / (w_m + λ·w)."""

    scale: float
    role: str = "reference"
    match: Match = field(default_factory=lambda: Match("velocity"))
    guidance_scale: float | None = None

    def __post_init__(self) -> None:
        if not self.scale > 0:
            raise ValueError(
                f"got anchor.scale={self.scale}; expected a number above 0; trainer.anchor=null leaves it out"
            )
        Teacher(self.guidance_scale)

    @property
    def teacher(self) -> Teacher:
        """It as a teacher of all prompts."""
        return Teacher(self.guidance_scale)


@dataclass(frozen=True)
class Teachers:
    """The teachers by role, and the route that says which of them a prompt has; None: there is one."""

    by_role: Mapping[str, Teacher]
    route: Route | None

    def of(self, record: PromptRecord) -> str:
        """The role that teaches a prompt."""
        return next(iter(self.by_role)) if self.route is None else self.route.of(record)

    def samplers(self, rollout: Rollout, records: Sequence[PromptRecord]) -> list[Sampler]:
        """Each prompt's teacher, as what rolls out."""
        return [Sampler(role, self.by_role[role].scale(rollout)) for role in map(self.of, records)]

    def rows(self, rollout: Rollout) -> int:
        """The most network rows that a state costs under one of them, without what the policy's own guidance doubles: as
        classifier-free guidance counts, one where guidance is an input of the network."""
        student = classifier_free_rows(rollout.guidance_scale)
        return -(-max(classifier_free_rows(each.scale(rollout)) for each in self.by_role.values()) // student)

    def check(self, rollout: Rollout, roles: Mapping[str, Role], records: Sequence[PromptRecord]) -> None:
        """ValueError for teachers that are no roles, that are the student, or that teach nobody; and for prompts without one."""
        if not self.by_role:
            raise ValueError("got trainer.teachers={}; expected at least one role of policy.roles, or 'reference'")
        for name, teacher in self.by_role.items():
            if name not in ("reference", *roles):
                raise ValueError(
                    f"got the teacher {name!r}; expected 'reference' or one of policy.roles {sorted(roles)}: add there "
                    f"{name}: {{init: FOLDER}}, the folder of its LoRA"
                )
            same = name in roles and roles[name].init == "policy" and not roles[name].follows
            if same and teacher.scale(rollout) == rollout.guidance_scale:
                raise ValueError(
                    f"got the teacher {name!r} with init=policy and the student's guidance, a copy of the student that has nothing to "
                    "teach; expected a folder as policy.roles init, or a guidance_scale of its own"
                )
        routed = set(self.by_role) if self.route is None else set(self.route.teachers.values())
        if (self.route is None and len(self.by_role) > 1) or routed != set(self.by_role):
            raise ValueError(
                f"got trainer.teachers {sorted(self.by_role)} and trainer.route={self.route}; expected one teacher without a route, or "
                "a route that leads to each of them and to no other: set route.key and route.teachers"
            )
        for record in records:
            self.of(record)
