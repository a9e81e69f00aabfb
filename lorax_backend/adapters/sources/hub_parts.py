"""Downloads from a hub that broke off are taken up where they ended, also by another process.

`huggingface_hub` writes each try into a file of its own and throws it away. Here the bytes go to a file named after
the content, in the cache's own folder; when it is whole it gets the name under which `huggingface_hub` finds it.
"""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import urlsplit

from filelock import FileLock
from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.file_download import http_get, repo_folder_name
from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

_PART = ".part"
REQUEST_TIMEOUT_S = 10.0


def download_blob(
    repo_id: str,
    name: str,
    commit: str,
    cache_dir: str | None,
    endpoint: str | None,
    token: str | None,
    timeout_s: float,
) -> None:
    """Bring a file's content to the cache, unless it is there; `hf_hub_download` then only has to give it its name.

    Blocks while another process downloads it, at most `timeout_s` seconds.

    Raises:
        OSError: it broke off, or could not be stored.
        filelock.Timeout: somebody else's download of it does not end.
    """
    cache = Path(cache_dir or constants.HF_HUB_CACHE)
    if isinstance(try_to_load_from_cache(repo_id, name, cache_dir=cache, revision=commit), str):
        return
    url = hf_hub_url(repo_id, name, revision=commit, endpoint=endpoint)
    facts = get_hf_file_metadata(url, token=token or False, timeout=REQUEST_TIMEOUT_S)
    if (
        not facts.etag
        or not facts.size
        or os.path.basename(facts.etag) != facts.etag
        or facts.etag.startswith(".")
    ):
        return
    # The content may lie at another host, whose business the token is not.
    elsewhere = urlsplit(facts.location).netloc != urlsplit(url).netloc
    headers = build_hf_headers(token=False if elsewhere else token or False, library_name="lorax-triton")
    folder = repo_folder_name(repo_id=repo_id, repo_type="model")
    blob = cache / folder / "blobs" / facts.etag
    part, locks = blob.with_name(blob.name + _PART), cache / ".locks" / folder
    blob.parent.mkdir(parents=True, exist_ok=True)
    locks.mkdir(parents=True, exist_ok=True)
    with FileLock(locks / f"{part.name}.lock", timeout_s):
        if blob.exists():
            return
        have = part.stat().st_size if part.exists() else 0
        if have > facts.size:
            part.unlink()
            have = 0
        with part.open("ab") as file:
            http_get(facts.location, file, resume_size=have, headers=headers, expected_size=facts.size)
        if part.stat().st_size != facts.size:
            part.unlink()  # it cannot be the beginning of the right one
            raise OSError(f"{name} is longer or shorter than announced")
        part.replace(blob)
