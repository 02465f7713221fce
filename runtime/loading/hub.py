"""A model's name -> the local folder that holds it: the embedded model, a folder, or a repository on the Hub.

Only the files of one variant are fetched, in formats that cannot run code (JSON, text, safetensors). A name from the
Hub is pinned to a commit, so that the same name means the same weights tomorrow.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path

from ..core import StylemuseError

logger = logging.getLogger(__name__)

EMBEDDED = "demo"

# What each name means unless a revision is given; commits of the published repositories.
PINNED = {
    "amused/amused-256": "09b6259bf96dbe6d70a852b70812420fe02df55e",
    "amused/amused-512": "a02a1d6847811ea2f5c8bf6d32b078466af007cc",
}

MARKER = "model_index.json"
COMPONENTS = {"transformer": "diffusion_pytorch_model", "vqvae": "diffusion_pytorch_model", "text_encoder": "model"}


def resolve(name: str, revision: str | None = None, variant: str | None = None) -> Path:
    """Finds a model, downloading it into the Hub's cache if need be.

    Args:
        name: "demo" for the embedded model (a folder of that name is "./demo"), the path of a folder in diffusers'
            layout, or a Hub id "organization/model".
        revision: a commit, tag or branch of a Hub id; by default the pinned commit, else the present head of main.
        variant: e.g. "fp16" to fetch the files ``*.fp16.safetensors`` instead of the plain ones.

    Returns:
        The folder, with model_index.json in it. For a Hub id ``revision_of`` tells the commit.

    Raises StylemuseError when the name is none of these, is not known to the Hub, cannot be fetched (no network, or
    HF_HUB_OFFLINE is set, and it is not in the cache), or when the folder holds no model_index.json.
    """
    if name == EMBEDDED:
        folder = Path(__file__).parent.parent / "assets" / EMBEDDED
    elif (given := Path(name).expanduser()).is_dir():
        folder = given
    elif re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        folder = _download(name, revision or PINNED.get(name), variant)
        revision = None
    else:
        allowed = f"{EMBEDDED!r}, a folder, or a Hub id 'organization/model'"
        raise StylemuseError(f"model {name!r} not found; allowed: {allowed}")
    if revision is not None:
        raise StylemuseError(f"model {name!r}: revision {revision!r} given; it is allowed for a Hub id only")
    if not (folder / MARKER).is_file():
        raise StylemuseError(f"model {name!r}: {folder} holds no {MARKER}; a folder in diffusers' layout is needed")
    return folder


def revision_of(folder: Path) -> str | None:
    """The commit of a folder in the Hub's cache (.../snapshots/<commit>); None for any other folder."""
    in_cache = folder.parent.name == "snapshots" and re.fullmatch(r"[0-9a-f]{40}", folder.name)
    return folder.name if in_cache else None


def wanted_files(variant: str | None) -> list[str]:
    """The patterns of the files a model needs, weights of one variant only, sharded or not."""
    middle = f".{variant}" if variant else ""
    shard = "-?????-of-?????"
    patterns = [MARKER, "scheduler/*.json", "tokenizer/*.json", "tokenizer/merges.txt"]
    for component, stem in COMPONENTS.items():
        endings = [f"{middle}.safetensors", f"{middle}{shard}.safetensors", f".safetensors.index{middle}.json"]
        if variant:
            endings += [f"{shard}{middle}.safetensors", f"{middle}.safetensors.index.json"]
        patterns += [f"{component}/config.json", *(f"{component}/{stem}{ending}" for ending in endings)]
    return patterns


def _download(name: str, revision: str | None, variant: str | None) -> Path:
    """The snapshot of a repository in the Hub's cache, completed from the network where it is not there yet."""
    from huggingface_hub import constants, errors, snapshot_download

    asked = f"model {name!r}" + (f" at revision {revision!r}" if revision else "")
    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=wanted_files(variant)))
    except errors.GatedRepoError as error:
        raise StylemuseError(f"{asked}: access has to be granted on its Hub page, then 'hf auth login'") from error
    except errors.RepositoryNotFoundError as error:
        raise StylemuseError(
            f"{asked}: the Hub has no such model, or it is private; known: {', '.join(PINNED)}"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise StylemuseError(f"{asked}: the Hub has no such commit, tag or branch") from error
    except errors.HFValidationError as error:
        raise StylemuseError(f"{asked}: not a Hub id; allowed: 'organization/model'") from error
    except errors.LocalEntryNotFoundError as error:
        reason = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the Hub cannot be reached"
        raise StylemuseError(f"{asked}: {reason}, and it is not complete in the cache") from error
    except Exception as error:  # a transport's errors share no base over the client's versions (requests, httpx)
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise StylemuseError(f"{asked}: the download failed: {reason}") from error
    if revision is None:
        logger.info("%s is not pinned; its main is now commit %s", asked, revision_of(folder))
    return folder
