"""The Hugging Face hub: files fetched from it, and whether it can be reached. If not, the cache is used at once, not
after the libraries' retries."""

import functools
import socket
import urllib.request
from contextlib import suppress
from pathlib import Path

from huggingface_hub import constants

from dual_lora.lab.config.outside.addresses import check_proxies, split_hub_address

CONNECT_SECONDS = 5.0  # for the hub to accept a connection
CONVERTER = "SFconvertbot"  # the hub's bot that converts weights to safetensors


def parse_hub_address() -> tuple[str, int]:
    """Return the hub's host and port.

    Raises:
        UserError: HF_ENDPOINT is not an address.
    """
    place = split_hub_address(constants.ENDPOINT)
    return place.hostname, place.port or (443 if place.scheme == "https" else 80)


@functools.cache
def is_hub_unreachable() -> bool:
    """Return whether nothing answers at the hub's address. Behind a proxy this is unknown, and False is returned.

    Raises:
        UserError: the hub's address, or a proxy's, is not one.
    """
    if constants.HF_HUB_OFFLINE:
        return False
    check_proxies()
    if urllib.request.getproxies().keys() - {"no"}:
        return False
    where = parse_hub_address()
    try:
        socket.create_connection(where, CONNECT_SECONDS).close()
    except OSError:
        return True
    return False


def use_cache_if_unreachable(models: bool = False, data: bool = False) -> None:
    """Read models or data sets only from the cache if the hub cannot be reached."""
    if models and is_hub_unreachable():
        constants.HF_HUB_OFFLINE = True
    if data and is_hub_unreachable():
        import datasets  # a second

        datasets.config.HF_HUB_OFFLINE = True


@functools.cache
def fetch_files(name: str, revision: str | None, *patterns: str) -> Path:
    """Return the folder in the cache with those files of a model's repository that match one of the patterns, fetched
    if they are not there; offline, with those of an earlier download. The folder is called like the commit."""
    from huggingface_hub import snapshot_download

    use_cache_if_unreachable(models=True)
    below = "*/*"  # the patterns would match files in its folders, too
    return Path(snapshot_download(name, revision=revision, allow_patterns=list(patterns), ignore_patterns=below))


def find_conversion(name: str) -> str | None:
    """Return the revision in which the hub's own bot has converted a model to safetensors, an open pull request; None
    if there is none, or the hub cannot be asked."""
    from huggingface_hub import HfApi

    wanted = {"author": CONVERTER, "discussion_type": "pull_request", "discussion_status": "open"}
    with suppress(Exception):  # all of it only serves a remedy
        return next((request.git_reference for request in HfApi().get_repo_discussions(name, **wanted)), None)
    return None
