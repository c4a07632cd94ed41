"""Command lines made of the commands' own options, with good, bad and extreme values."""

import inspect
import random
import resource
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import typer
from glp_lens_cli import app

from tests.fuzz import children
from tests.fuzz.rounds import FAULT, Harness, Outcome
from tests.fuzz.world import World

LIMIT = 60.0
"""Seconds that a line may take."""
RAY_LIMIT = 300.0
"""The same with Ray, whose processes import everything anew. It reserves more addresses than `MEMORY` too."""
MEMORY = 4 << 30
"""Bytes that a line may take besides what the harness has taken."""
WORK = 150
"""Linear layers computed before a refusal, above which it came late: finding a hook point takes 87 in the three blocks
here, the shortest run over texts 187."""
PACKAGED_WORK = 10 * WORK
"""The same for lines that name no language model, which open the packaged one of 30 blocks."""

HUGE = ("1000000000", "9223372036854775808", "1e18")
NUMBERS = {
    int: ("0", "1", "2", "3", "7", "-1", "-7", "3.5", "nan", "", "ten", "1e3", "٣", *HUGE),
    float: ("0", "1", "0.5", "0.1", "2", "-1", "1e308", "-1e308", "1e-320", "nan", "inf", "-inf", "", "half", "0,5"),
}
TEXTS = ("", " ", "nothing", "none", "$x_1$ & <b>%s</b>", "a=b=c", ",", "x" * 300, "ünï ☃", "-", "../..", "{f}")
"""Texts that are no good name of anything."""
PATHS = ("texts.csv", "acts", "models/pca", "missing", "texts.csv/below", "/proc/none", "out/new", "lm", "empty.txt")
"""Names of what is there, of what is not, and of what cannot be."""
GOOD = {
    "--model": ("lm", "missing"),
    "--models": ("models/gaussian", "models/glp,models/pca", "a=models/sae", "models/raw", "released"),
    "--prior": ("models/gaussian", "models/glp"),
    "--finetune": ("models/glp", "models/pca"),
    "--ref": ("models/glp", "models/pca"),
    "--store": ("acts", "heldout", "flipped", "parts"),
    "--train-store": ("acts", "heldout"),
    "--heldout": ("heldout", "acts"),
    "--validation": ("heldout", "acts"),
    "--texts": ("texts.csv", "prompts.txt", "mine.csv"),
    "--hook": ("blocks.1.hook_resid_post", "blocks.2.hook_mlp_out", "blocks.9.hook_resid_post", "hook_embed"),
    "--device": ("cpu", "meta", "cuda:77", "banana"),
    "--tasks": ("mine.csv", "shuffled", "code", "family:hate"),
    "--results": ("results", "results/density", "acts", "scaled"),
    "--direction": ("direction.safetensors", "rows.npy"),
    "--folder": ("features", "built", "acts"),
    "--config": ("compare.yaml", "train.yaml", "texts.csv"),
    "--out": ("out", "acts", "models/pca", "texts.csv", "out/new.npy", "out/new.csv"),
}
"""Values that fit, and some that fit elsewhere."""

BASES = {
    "quickstart": ("--config compare.yaml",),
    "collect": ("--model lm --texts texts.csv --context 24 --tokens 200 --out out",),
    "train": (
        "glp --store acts --rows 64 --batch-size 16 --width 12 --mlp 20 --layers 2 --out out",
        "sae --store acts --rows 128 --batch-size 32 --latents 40 --k 5 --out out", "pca --store acts --out out",
        "gaussian --store acts --out out", "raw --store acts --out out", "random --store acts --features 40 --out out",
    ),
    "direction": ("--model lm --positive-texts for.txt --negative-texts against.txt --out out/way.safetensors",),
    "generate": ("--model lm --direction direction.safetensors --store acts --strength 1 --new-tokens 2",),
    "sample": ("models/glp --n 5 --out out/rows.npy", "models/pca --n 5 --out out/rows.npy"),
    "probe": ("--model lm --models models/gaussian --tasks mine.csv --probe-train 20 --probe-test 10 --out out",),
    "steer": ("--model lm --models models/gaussian --store acts --strengths 1 --prompts 2 --new-tokens 2 --out out",),
    "fidelity": ("--model lm --models models/gaussian --store acts --texts texts.csv --documents 2 --out out",),
    "density": ("--models models/gaussian --store heldout --out out",),
    "detect": ("--model lm --models models/gaussian --store acts --tasks code --detect-texts 9 --detect-fit 9 "
               "--context 12 --texts texts.csv --out out",),
    "generation": ("--models models/gaussian --store acts --heldout heldout --samples 150 --sampling 2 --out out",),
    "score": ("--model lm --models models/gaussian --texts prompts.txt --out out",),
    "features build": (
        "--model lm --models models/gaussian --texts texts.csv --tokens 200 --context 24 --sample 20 --out out",
        "--model lm --models models/glp --store acts --tokens 200 --sample 20 --random --out out",
    ),
    "features show": ("1:3 --folder features", "0:1 'my sae/7' --examples 2"),
    "features top": ("--model lm --text 'the cat' --models glp=models/glp",  # refused: it was another language model
                     "--folder built --model lm --text 'the cat'"),
    "features steer": ("1:3 --model lm --new-tokens 2", "1:3 --folder built --model lm --new-tokens 2"),  # likewise
    "features export": ("--to saedashboard --out out", "1:3 --to directions --out out/way.npy",
                        "--to neuronpedia --all-of 'my sae' --out out"),
    "compare": ("--config compare.yaml",),
    "features score": ("--folder features --model lm --texts texts.csv --context 24 --passage 6 --out out",
                       "--folder built --model lm --texts texts.csv --context 24 --passage 6 --out out"),
    "features explain": ("--folder features --model lm --texts texts.csv --context 24 --hosted-retries 0 "
                         "--hosted-url http://127.0.0.1:9/v1 --hosted-model m",),
    "scale": (
        "--store acts --heldout heldout --widths 12 --layers 2 --rows 640 --glp-batch 64 --suites density --out out",
        "--model lm --store acts --heldout heldout --widths 12 --layers 1 --rows 64 --glp-batch 16 --dry-run --out out",
    ),
    "report": ("results --out out", "results/probe --out out"),
    "choose": ("scaled --rows 1000 --minutes 1", "scaled --rows 500", "results --rows 1000"),
    "card": ("models/pca --out out/card.md", "models/gaussian --results results/density --out out/card.md",
             "scaled/cells/glp-w12x2-r640-s0/model --results scaled --out out/card.md"),
    "tasks": ("", "--json", "'*glue*' 5_hist_fig_ismale"),
    "doctor": ("", "--json"),
    "push": ("models/pca owner/name", "missing owner/name"),
    "features page": ("--folder features --out out/page.html",),
    "features serve": ("--folder features --model lm --port 0",),  # refused: the models have other weights
    "store info": ("acts", "parts", "lm"),
    "store verify": ("acts", "flipped", "parts"),
    "store repair": ("flipped", "acts"),
    "store merge": ("parts", "out parts"),
    "store import": ("rows.npy out --from arrays --hook blocks.1.hook_resid_post",),
    "store export": ("acts out --to memmaps", "acts out/rows.npy --to arrays", "acts out --to sae-lens"),
}  # fmt: skip
"""The shortest lines of each command that work; those of a comparison are cut short by a value that is refused."""


@dataclass(frozen=True)
class Option:
    """An option of a command.

    Attributes:
        flag: its longest name.
        negative: of a switch, the name that turns it off; empty if there is none.
        kind: `int`, `float`, `bool`, `str` or `Path`; of choices `str`.
        choices: the values it may have; none where it is no choice.
        several: whether it takes values separated by commas.
        limits: least and most.
        default: without an option, as words.
    """

    flag: str
    negative: str
    kind: type
    choices: tuple[str, ...]
    several: bool
    limits: tuple[float, ...]
    default: tuple[str, ...]


@cache
def commands() -> dict[str, list[Option]]:
    """The options of each command, by its name; a command that `BASES` lacks is an error here, not left out."""
    groups = [("", app), *((f"{group.name} ", group.typer_instance) for group in app.registered_groups)]
    found = {
        f"{name}{command.name or command.callback.__name__}": _options(command.callback)
        for name, group in groups
        for command in group.registered_commands
    }
    if found.keys() != BASES.keys():
        raise LookupError(f"commands without a line in BASES, or the other way: {found.keys() ^ BASES.keys()}")
    return found


def _options(command: Any) -> list[Option]:
    """The options of the function that a command is made of; what stands without a name is left out."""
    found = []
    hints = get_type_hints(command, include_extras=True)
    for name, parameter in inspect.signature(command).parameters.items():
        if get_origin(hints[name]) is not Annotated:  # the context of the call
            continue
        annotation, info = hints[name].__origin__, hints[name].__metadata__[0]
        if not isinstance(info, typer.models.OptionInfo):
            continue
        kind = next((part for part in get_args(annotation) if part is not type(None)), annotation)
        kind = annotation if get_origin(annotation) in (list, Literal) else kind
        several = get_origin(kind) is list
        choices = get_args(kind) if get_origin(kind) is Literal else ()
        # In Annotated the first name stands where a default would.
        given = [words for words in (info.default, *(info.param_decls or ())) if isinstance(words, str)]
        names = [each for words in given for each in words.split("/")] or ["--" + name.replace("_", "-")]
        default = parameter.default if isinstance(parameter.default, list) else [parameter.default]
        found.append(
            Option(
                max((each for each in names if not each.startswith("--no-")), key=len),
                next((each for each in names if each.startswith("--no-")), ""),
                str if several or choices else kind,
                choices,
                several,
                tuple(limit for limit in (info.min, info.max) if limit is not None),
                tuple(str(each) for each in default if each is not None and each is not inspect.Parameter.empty),
            )
        )
    return found


def make(rng: random.Random) -> tuple[str, str]:
    """A command and a line of it."""
    names = list(BASES)
    # Comparisons that are not refused take as long as all other lines together.
    name = rng.choices(names, [1 if name in ("quickstart", "compare") else 4 for name in names])[0]
    options = commands()[name]
    words = shlex.split(rng.choice(BASES[name])) if rng.random() < 0.9 else []
    if name in ("quickstart", "compare"):
        words += ["--device", "banana"] if rng.random() < 0.9 else []
    for option in rng.sample(options, min(len(options), rng.choice((1, 1, 1, 2, 3)))):
        if option.kind is bool:
            words.append(rng.choice([option.flag, option.negative or option.flag]))
        else:
            words.append(f"{option.flag}={_value(option, rng)}")
    if rng.random() < 0.08:  # a word too many, or one lost
        words.insert(rng.randrange(len(words) + 1), rng.choice((*TEXTS, "--nothing", "-x")))
    if rng.random() < 0.08 and words:
        del words[rng.randrange(len(words))]
    return name, shlex.join([*name.split(), *words])


def _value(option: Option, rng: random.Random) -> str:
    pool = list(_values(option))
    value = rng.choice(pool)
    if option.several and rng.random() < 0.4:
        value = ",".join([value, *(rng.choice(pool) for _ in range(rng.choice((1, 2))))])
    return value


def _values(option: Option) -> Iterator[str]:
    yield from option.default
    yield from GOOD.get(option.flag, ())
    yield from (f"{limit + step:g}" for limit in option.limits for step in (-1, 0, 1))
    if option.choices:
        yield from (*option.choices, "", "nothing")
    elif option.kind in NUMBERS:
        yield from NUMBERS[option.kind]
    else:
        yield from TEXTS
        yield from PATHS if option.kind is Path or option.flag in GOOD else (*NUMBERS[float], *HUGE)


def _limit_memory() -> None:
    """Let allocations fail, rather than the machine."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))


def one(world: World, case: Path, rng: random.Random, number: int) -> Outcome:
    """Run a line: it succeeds, or is refused at once, in one line."""
    name, line = make(rng)
    world.copy(case)
    (case / "empty.txt").touch()
    ray = "--ray" in line
    end = children.run(line, case, prepare=(lambda: None) if ray else _limit_memory, limit=RAY_LIMIT if ray else LIMIT)
    what, said = f"glp-lens {line}", (end.lines or [""])[-1][:300]
    if end.hung and any(huge in line for huge in HUGE):
        return Outcome(name, "long work that was asked for", what)
    if end.fault:
        return Outcome(name, FAULT, what, end.fault[:600])
    if end.code == 0:
        return Outcome(name, "done", what)
    if end.layers > (WORK if " lm" in what else PACKAGED_WORK):
        return Outcome(name, FAULT, what, f"refused only after {end.layers} linear layers: {said}")
    return Outcome(name, "refused", what, said)


HARNESS = Harness("lines", "command lines with good, bad and extreme values", 2000, one)
