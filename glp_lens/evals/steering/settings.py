"""Settings of the steering suite, and the packaged prompts."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Literal, get_args

from glp_lens.defaults import DEFAULT_DTYPE, Dtype
from glp_lens.endpoint import EndpointSettings
from glp_lens.errors import InputError
from glp_lens.evals.settings import ProjectionSettings
from glp_lens.evals.steering.personas import PERSONAS
from glp_lens.limits import LARGEST_SEED
from glp_lens.settings import option

UNSTEERED, PLAIN, SHRINK = "unsteered", "plain", "shrink"
"""Labels of generations without steering, of steering without repair, and of less of it at each strength."""
NORM, CLIPPED = "norm-preserving", "clipped"
"""Labels of steered activations scaled back to the norm they had, and to a large quantile of norms at most."""
ISOTROPIC, COVARIANCE, SHUFFLED = "random isotropic", "random covariance", "random labels"
"""Labels of steering in directions that mean nothing: uniform on the sphere, drawn from the activations' covariance,
and a difference of means of the direction's texts under shuffled labels."""
CONTROLS = (SHRINK, NORM, CLIPPED, ISOTROPIC, COVARIANCE, SHUFFLED)
RANDOM = "random"
"""What the last three have in common."""
CONTROLS_AT_RANDOM = (RANDOM, ISOTROPIC, COVARIANCE, SHUFFLED)
SAE = "sae"
"""Label of the sparse autoencoder, which methods are compared with where it is there."""
ALL = "all"
"""The task of means over concepts."""
SHRINK_FACTOR = 0.8
CLIP_QUANTILE = 0.99
GRID = (0.3, 0.5, 0.7, 0.9, 1.1)
"""The default strengths, as shares of the one at which fluency halves."""
ConceptName = Literal[
    "sports", "business", "world", "technology", "trump", "obama", "china", "iran", "clickbait", "spam", "python", "hr",
    "sentiment", "film-sentiment",
]  # fmt: skip
Experiment = Literal["topics", "sentiment", "features", "persona"]
Repair = Literal["paper", "project", "difference", "orthogonal"]
Control = Literal[
    "shrink", "norm-preserving", "clipped", "random isotropic", "random covariance", "random labels", "none"
]
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
    "As far as I know", "Somebody had left a note", "The woman next to me",
    "It would be easy to", "Two days later I received", "The only thing left was",
    "All of them wanted to", "His first words were about", "When I was a child",
    "The story starts with a", "There was no doubt that", "She looked up and said",
    "They could not agree on", "In the middle of the", "He began to explain how",
    "Everyone was talking about the", "I have always believed that", "The room was full of",
    "Just before we left the", "It has been said that", "A man in the corner",
    "The second part is about", "Nothing in the world can", "We were told that the",
    "Her answer was that the", "The last time we met", "On the other side of",
    "Many years ago there was", "He gave me a list", "I opened the book and",
    "The problem with this is", "Later that day she found", "What they did next was",
    "The people who live here", "As soon as he arrived", "It is hard to explain",
    "You will need to know", "The news came as a", "Between the two of them",
    "At first I thought that", "She kept asking about the", "There are many ways to",
    "The whole thing began when", "He was known for his", "I would like to tell",
    "During the long wait they", "The message on the screen", "Few of us had ever",
    "To my great surprise the", "They spent the afternoon with", "Over the past few weeks",
    "A voice behind me said", "The idea came to him", "We should not forget that",
    "Even now I wonder why", "The strange part is that", "My neighbour wants to know",
    "In the end it was", "He turned around and saw", "The first question is whether",
    "What we know so far",
)  # fmt: skip
"""Prefixes that favour no topic. All are five common words, so most tokenizers give them one length and they
share a batch without padding."""


@dataclass(frozen=True, kw_only=True)
class JudgeSettings(EndpointSettings):
    """Who judges generated texts."""

    panel: ClassVar[str] = "Judges"

    fluency_judge: Literal["auto", "lm", "ngram"] = "auto"
    """Judge of fluency: a second language model, a trigram model, or the first where one is installed."""
    fluency_tokens: int = option(1_500_000, min=1)
    """About how many tokens the trigram model is trained on, at most."""
    second_model: str | None = None
    """Name or folder of the second language model; by default a packaged one of another family."""
    second_dtype: Dtype = DEFAULT_DTYPE
    """Number format of the second language model."""
    hosted_url: str | None = option(None, panel=EndpointSettings.panel)
    """OpenAI-compatible endpoint of one more judge, such as https://host/v1."""


@dataclass(frozen=True, kw_only=True)
class RepairSettings(ProjectionSettings):
    """How models repair steered activations, and what a strength is."""

    panel: ClassVar[str] = "Suites"

    repairs: tuple[Repair, ...] = ("paper", "project", "difference", "orthogonal")
    """How models repair a steered activation: its projection, of a GLP at the paper's noise level ('paper') and at a
    milder one; the difference that steering makes to the projection; or, of a GLP, the part of the correction that is
    orthogonal to the direction."""
    project_sigma: float = option(0.3, min=0.001, max=0.999)
    """A GLP's milder noise level for projections, and that of 'orthogonal'."""
    difference_sigma: float = option(0.6, min=0.001, max=0.999)
    """A GLP's noise level for 'difference'."""
    strength_unit: Literal["centred", "norm"] = "centred"
    """What a strength of 1 adds: the median distance of activations from their mean, or, as in the paper, their
    median norm."""


@dataclass(frozen=True, kw_only=True)
class SteeringSettings(JudgeSettings, RepairSettings):
    """What decides the numbers of `steering.run`, besides models and data."""

    panel: ClassVar[str] = "Suites"

    experiment: Experiment = "topics"
    """What generation is steered towards: topics of texts; sentiment; 'features', decoder directions of the SAE among
    the models; or 'persona', traits of an instruction-tuned model."""
    concepts: tuple[str, ...] = ()
    """Which of the experiment's concepts, separated by commas; 'all' for those of the experiment that can be judged, of
    topics eight; by default sports, or all of another experiment."""
    features: int = option(8, min=1)
    """Number of SAE latents of the experiment 'features'."""
    strengths: tuple[float, ...] = ()
    """Steering strengths; by default shares of the strength at which fluency halves, found by a short search."""
    prompts: int = option(24, min=2, max=len(PROMPTS), memory=True)
    """Neutral prompts that generations start from; of 'persona' questions, 40 at most."""
    new_tokens: int = option(24, min=1, memory=True)
    """Tokens generated after each prompt."""
    controls: tuple[Control, ...] = (
        "shrink", "norm-preserving", "clipped", "random isotropic", "random covariance", "random labels",
    )  # fmt: skip
    """Other conditions: weaker steering, plain rescaling, and directions that mean nothing; 'none' for none."""
    noise_seeds: tuple[int, ...] = option((0,), min=0, max=LARGEST_SEED)
    """Seeds of the noise of GLPs; a verdict needs two at least."""
    dtypes: tuple[Dtype, ...] = ()
    """Number formats of the language model in which generations are repeated; a verdict needs bfloat16 and float32."""
    replicate_prompts: int | None = option(None, min=2)
    """Prompts that are repeated with other seeds and number formats; by default all."""
    texts_per_side: int = option(256, min=1, memory=True)
    """Texts about the topic, and as many about others, whose mean activations differ by the steering direction."""
    guidance: tuple[float, ...] = ()
    """Also steer without a push, by a GLP's projection that a probe's gradient leads, or the condition of 'classes', at
    these scales."""
    classes: tuple[str, ...] = ()
    """Concepts that a conditional GLP knows as classes of its label, such as sports=0,business=1."""

    def __post_init__(self) -> None:
        """Check each setting, and that strengths rise."""
        super().__post_init__()
        for name in ("strengths", "guidance"):
            values = getattr(self, name)
            if values and (values[0] <= 0 or any(b <= a for a, b in pairwise(values))):
                raise InputError(f"{name} must be positive and rising, got {list(values)}")
        known = {"topics": get_args(ConceptName), "sentiment": get_args(ConceptName), "persona": tuple(PERSONAS)}
        if self.experiment == "features" and self.concepts:
            raise InputError("the experiment 'features' chooses its latents itself: leave out concepts")
        names = known.get(self.experiment, ())
        if wrong := [name for name in self.concepts if name not in names and self.concepts != ("all",)]:
            what = "'all' beside others" if wrong[0] == "all" else repr(wrong[0])
            raise InputError(f"concepts of {self.experiment} are all, or {', '.join(names)}; got {what}")
        for several in ("concepts", "dtypes", "controls", "repairs"):
            values = getattr(self, several)
            if len(set(values)) < len(values):
                raise InputError(f"{several} must be different, got {', '.join(values)}")
        if self.classes and not self.guidance:
            raise InputError("classes are for guidance by a condition: pass guidance, such as 1,2,4, with them")
        if "none" in self.controls and len(self.controls) > 1:
            raise InputError("controls are 'none' or some of the others, not both")
        for pair in self.classes:
            name, equals, value = pair.partition("=")
            if not (name in names and equals and value.lstrip("-").replace(".", "", 1).isdecimal()):
                raise InputError(f"classes must be pairs of a concept and a class, such as sports=0, got {pair!r}")
        if len(set(self.noise_seeds)) < max(1, len(self.noise_seeds)):
            raise InputError(f"noise_seeds must be one or several different seeds, got {list(self.noise_seeds)}")
