"""Settings of the steering suite, and the packaged prompts."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Literal

from glp_lens.errors import InputError
from glp_lens.evals.settings import ProjectionSettings
from glp_lens.settings import option

UNSTEERED, PLAIN, RANDOM = "unsteered", "plain", "random"
"""Labels of generations without steering, of steering without repair, and of steering in a random direction."""
ConceptName = Literal["sports", "business", "world"]
PROMPTS = (
    "The first thing I noticed", "When she opened the door", "On the way home we",
    "Nobody in the room could", "After a long pause he", "It was clear that the",
    "The old man looked at", "There is one thing that", "My friend told me that",
    "The letter began with the", "In the morning they were", "For the last few days",
    "She said that she would", "We had to wait until", "What surprised me most was",
    "He put the box on", "Most of the people here", "At the end of the",
    "They found a small note", "The best part of the", "Every year around this time",
    "I was not sure whether", "A few minutes later the", "The next page says that",
    "Some people think that the", "He could not remember the", "Not far from here is",
    "The reason for this is", "By the time we arrived", "You may have heard that",
    "The answer to the question", "Last night I thought about", "One of the children asked",
    "We sat down and talked", "The photo on the wall", "If you ask me now",
    "It took them almost an", "Before I could say anything", "The rest of the day",
    "As far as I know",
)  # fmt: skip
"""Prefixes that favour no topic. All are five common words, so most tokenizers give them one length and they
share a batch without padding."""


@dataclass(frozen=True, kw_only=True)
class SteeringSettings(ProjectionSettings):
    """What decides the numbers of `steering.run`, besides models and data, and the noise levels of the repairs."""

    panel: ClassVar[str] = "Suites"

    concept: ConceptName = "sports"
    """Topic that generation is steered towards."""
    strengths: tuple[float, ...] = (0.2, 0.4, 0.6, 0.8, 1.0)
    """Steering strengths, in median activation norms."""
    prompts: int = option(24, min=2, max=len(PROMPTS))
    """Neutral prompts that generations start from."""
    new_tokens: int = option(24, min=1)
    """Tokens generated after each prompt."""
    project_sigma: float = option(0.2, min=0.001, max=0.999)
    """A second, milder noise level of a GLP's projection."""
    texts_per_side: int = option(256, min=1)
    """Texts about the topic, and as many about others, whose mean activations differ by the steering direction."""
    fluency_tokens: int = option(1_500_000, min=1)
    """About how many tokens the n-gram model of the fluency judge is trained on, at most."""
    random_repaired: bool = False
    """Also repair activations moved along the random direction."""

    def __post_init__(self) -> None:
        """Check each setting, and that strengths rise."""
        super().__post_init__()
        if not self.strengths or self.strengths[0] <= 0 or any(b <= a for a, b in pairwise(self.strengths)):
            raise InputError(f"strengths must be positive and rising, got {list(self.strengths)}")
