"""The Hugging Face Hub: downloading and publishing models, and their model cards."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from glp_lens.errors import InputError
from glp_lens.kinds import KINDS
from glp_lens.types import Json

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_UNREACHED = re.compile("Connect|Timeout|Proxy|LocalEntry")
"""In the class names of errors if the Hub was not reached; the classes depend on the client's version."""

_RELEASED = (
    'The files are in the format of the released GLPs, whose code opens them with `load_glp("{}", checkpoint="final")`.'
)


def fetch(name: str | Path, files: Sequence[str], *, revision: str | None = None) -> Path:
    """The folder of that name, or of the Hub repository of that id, with these of its files downloaded.

    Args:
        name: a folder, or an id `owner/name`; a `Path` is a folder always.
        files: names in the repository; those it does not have are left out.
        revision: branch, tag or commit of a repository.

    Raises:
        InputError: neither is there, no network, or no right to read it.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        if revision is not None:
            raise InputError(f"revision {revision!r} is of a Hub repository, and {name} is a folder: leave it out")
        return path
    if path.exists():
        raise InputError(f"model cannot be read: {name} is a file, expected a folder or a Hub id")
    if isinstance(name, Path) or not _ID.fullmatch(name):
        raise InputError(f"model not found: {name} does not exist: expected a folder or a Hub id such as 'owner/name'")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(files), etag_timeout=10))
    except Exception as error:  # network, proxy and Hub raise unrelated classes of errors
        reason = _reason(error, denied="there is no such repository, or it is private", revision=revision)
        raise InputError(f"{name!r} is no folder and cannot be fetched from the Hub ({reason})") from None


def check_id(repo_id: str) -> None:
    """Refuse a malformed repository id before any work is done for it."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repo_id)
    except HFValidationError:
        raise InputError(
            f"{repo_id!r} is no repository id: expected 'owner/name' of letters, digits, '-', '_', '.'"
        ) from None


def push(
    folder: Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    token: str | None = None,
    message: str = "Upload model",
    replaced: Sequence[str] = (),
) -> str:
    """Upload a folder to a repository, which is created if it is not there, as one commit.

    Args:
        private: whether a new repository is; one that is there stays as it is.
        revision: branch, created if it is not there.
        replaced: patterns of files of an earlier upload that go away, unless the folder has them.

    Returns:
        Address of the commit.

    Raises:
        InputError: no network, or no right to write.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi(token=token, library_name="glp-lens")
        repository = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None:
            api.create_branch(repository, branch=revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            revision=revision,
            commit_message=message,
            delete_patterns=list(replaced) or None,
        )
    except Exception as error:  # as in `fetch`
        reason = _reason(error, denied="no token, or one that may not write there")
        raise InputError(f"cannot push to {repo_id!r} ({reason})") from None
    return str(commit.commit_url)


def card(
    about: Json,
    repo_id: str,
    *,
    license: str | None = None,
    released: bool = False,
    sections: Mapping[str, str] | None = None,
) -> str:
    """README.md of a saved model: what it is, its training data and training, how to load it, and its limits.

    Args:
        about: content of its `config.json`; entries that it lacks are left out.
        repo_id: what its example loads: an id on the Hub, or a folder.
        license: name in the Hub's list, such as `mit`.
        released: whether it is published in the format of the released GLPs.
        sections: what else is told, such as what was measured: Markdown by title; empty ones are left out.
    """
    from huggingface_hub import ModelCardData

    kind, provenance = about["kind"], about["provenance"]
    store, training = (provenance.get(part) or {} for part in ("store", "training"))
    model, corpus = (store.get(part) or {} for part in ("model", "corpus"))
    base, dataset = (str(part.get("name") or "").partition(" (")[0] for part in (model, corpus))
    hooks = [store["hook"]] if store.get("hook") else list(store.get("hooks") or ())
    header = ModelCardData(
        library_name="glp-lens",
        tags=["glp-lens", kind, "activations", "interpretability"],
        base_model=base if _ID.fullmatch(base) else None,
        datasets=[dataset] if _ID.fullmatch(dataset) else None,
        license=license,
    )
    data = {
        "language model": model.get("name"),
        "weights of the language model": model.get("weight_processing"),
        "hash of these weights": store.get("weights"),
        "hook point": ", ".join(hooks),
        "rows": store.get("rows"),
        "corpus": corpus.get("name"),
        "documents": corpus.get("documents"),
        "context (tokens)": store.get("context"),
        "left out": ", ".join(f"{count:,} {what}" for what, count in (store.get("excluded") or {}).items()),
        "longest row (norm)": store.get("max_norm"),
        "normaliser": "mean 0 and variance 1 in each dimension" if kind == "glp" else None,
    }
    texts = {
        "Trained on": _facts(data),
        "Training": _facts({**_shape(about["model"]), **training, **_last_losses(about["model"])}),
        **(sections or {}),
        "Use": _use(kind, repo_id, hooks, base, released=released),
        "Limits": "\n".join(_limits(base, hooks, store)),
        "Versions": _facts(about["versions"]),
    }
    title = f"---\n{header.to_yaml()}\n---\n\n# {Path(repo_id).resolve().name}\n"
    what = f"\n{KINDS[kind].card if kind in KINDS else 'A model of activations'}, of width {about['d_in']}.\n"
    return title + what + "".join(f"\n## {name}\n\n{text}\n" for name, text in texts.items() if text)


def _facts(values: Mapping[str, Any]) -> str:
    """A list of the values that are known."""
    lines = []
    for name, value in values.items():
        if value is None or value in ("", [], {}):
            continue
        number = isinstance(value, int | float) and not isinstance(value, bool)
        text = (f"{value:,}" if isinstance(value, int) else f"{value:.6g}") if number else " ".join(str(value).split())
        lines.append(f"- {name.replace('_', ' ')}: {text}")
    return "\n".join(lines)


def _shape(config: Json) -> Json:
    """The settings of a saved model that are plain values."""
    flat = {**config, **(config.get("denoiser") or {})}
    return {name: value for name, value in flat.items() if isinstance(value, str | int | float)}


def _last_losses(config: Json) -> Json:
    """The last losses of the curve, if the model keeps one."""
    history = config.get("history") or [{}]
    return {f"final {k}": v for k, v in history[-1].items() if "loss" in k and isinstance(v, int | float)}


def _use(kind: str, repo_id: str, hooks: Sequence[str], base: str, *, released: bool) -> str:
    lines = ["import glp_lens as gl", "", f'model = gl.load("{repo_id}")']
    if kind == "glp" and hooks:
        if _ID.fullmatch(base):
            lines.append(f'language_model = gl.open_model("{base}")')
        else:
            lines.append('language_model = gl.open_model("...")  # the one that it was trained on')
        if len(hooks) > 1:
            lines.append(f'model = model.at("{hooks[0]}")  # or another of its hook points')
        lines += [
            "with language_model.hooks(fwd_hooks=[model.projection_hook(sigma=0.2, model=language_model)]):",
            '    print(language_model.generate("The weather today", max_new_tokens=20))',
        ]
    code = "\n".join(["```python", *lines, "```"])
    return f"{code}\n\n{_RELEASED.format(repo_id)}" if released else code


def _limits(base: str, hooks: Sequence[str], store: Json) -> list[str]:
    """Limits of the model that follow from its training data."""
    where = f"of {base or 'the language model'}" + (f" at {', '.join(hooks)}" if hooks else "")
    lines = [f"- It describes activations {where} only: another model, hook point or weight processing is other data."]
    if store.get("corpus"):
        lines.append("- It knows the kind of text it was trained on: activations on other text may look untypical.")
    if store.get("max_norm"):
        lines.append("- It saw no row longer than the norm above, and projection hooks leave such rows as they are.")
    return lines


def _reason(error: Exception, *, denied: str, revision: str | None = None) -> str:
    """The reason why a request to the Hub failed, in a few words."""
    from huggingface_hub import constants
    from huggingface_hub.errors import LocalTokenNotFoundError, RevisionNotFoundError

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set: unset it to go online"
    if isinstance(error, RevisionNotFoundError):
        return f"it has no revision {revision!r}"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403, 404) or isinstance(error, LocalTokenNotFoundError):
        return f"{denied}: log in with 'hf auth login', or set HF_TOKEN"
    line = (str(error).splitlines() or [""])[0].strip() or type(error).__name__
    unreached = _UNREACHED.search(type(error).__name__)
    return f"{line[:120]}: is there a network?" if unreached else line[:120]
