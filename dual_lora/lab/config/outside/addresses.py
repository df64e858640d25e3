"""Addresses of the hub and of proxies that the environment gives. No message shows one: it may hold a password."""

import os
from urllib.parse import SplitResult, urlsplit

from dual_lora.lab.errors import UserError

HUB = "https://huggingface.co"
PROXIES = ("https_proxy", "http_proxy", "all_proxy")


def split_address(name: str, text: str, example: str) -> SplitResult:
    """Return the parts of an address, http(s)://HOST, with a valid port if it gives one. name: the variable it is from.

    Raises:
        UserError: it is not one. A password with a slash that is not written %2F makes it another one.
    """
    try:
        place = urlsplit(text.strip())
        is_valid = place.port != 0 and place.hostname and "@" not in place.path
    except ValueError:  # the port is not a number, or a bracket is missing
        is_valid = False
    if not is_valid:
        form = "unset it, or give one like"
        raise UserError(f"{name}: not an address; {form} {example} (in a password, / is written %2F and @ %40)")
    return place


def split_hub_address(text: str) -> SplitResult:
    """Return the parts of the hub's address.

    Raises:
        UserError: it is not one.
    """
    has_scheme = text.strip().startswith(("http://", "https://"))
    return split_address("HF_ENDPOINT", text if has_scheme else "", HUB)


def check_hub_address() -> None:
    """Refuse a HF_ENDPOINT that is not an address: huggingface_hub cannot even be imported with some.

    Raises:
        UserError: it is not one.
    """
    if text := os.environ.get("HF_ENDPOINT"):
        split_hub_address(text)


def check_proxies() -> None:
    """Refuse proxies that are not addresses, before anything is asked of the hub.

    Raises:
        UserError: with the variable.
    """
    for name in (spelt for proxy in PROXIES for spelt in (proxy, proxy.upper())):
        if text := os.environ.get(name):
            split_address(name, text if "://" in text else f"http://{text}", "http://PROXY:3128")
