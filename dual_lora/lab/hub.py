"""Whether the Hugging Face hub can be reached, asked once: without it only the cache is used, at once instead of after
a minute of the libraries' retries."""

import functools
import socket
import urllib.request
from urllib.parse import urlsplit

import datasets
from huggingface_hub import constants

SECONDS = 5.0  # for the hub to take a connection


@functools.cache
def cut() -> bool:
    """Return whether nobody answers at the hub's address; behind a proxy that cannot be told, so it is not said."""
    place = urlsplit(constants.ENDPOINT)
    if constants.HF_HUB_OFFLINE or urllib.request.getproxies():
        return False
    try:
        socket.create_connection(
            (place.hostname, place.port or (443 if place.scheme == "https" else 80)), SECONDS
        ).close()
    except OSError:
        return True
    return False


def settle(models: bool = False, data: bool = False) -> None:
    """Let models or data sets come from the cache alone where the hub is cut off."""
    if models and cut():
        constants.HF_HUB_OFFLINE = True
    if data and cut():
        datasets.config.HF_HUB_OFFLINE = True
