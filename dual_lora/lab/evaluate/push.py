"""Send an exported folder to the user's own repository on the Hugging Face hub.

The token is huggingface_hub's own (`hf auth login`, or HF_TOKEN); it is neither read here nor recorded.
"""

import shlex
from pathlib import Path

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from dual_lora.lab.config.outside.hub import is_hub_unreachable
from dual_lora.lab.errors import UserError, get_first_line, require


def is_offline() -> bool:
    """Return whether the hub is not to be used, or nothing answers there."""
    return bool(constants.HF_HUB_OFFLINE) or is_hub_unreachable()


def check_push(name: str) -> None:
    """Refuse a name that no repository can have, and, online, a push without a token, before anything is exported.

    Raises:
        UserError: with the remedy.
    """
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(f"push_to_hub={name[:80]}: not a repository name; give ORG/NAME") from error
    require("/" in name, f"push_to_hub={name[:80]}: names no owner; give ORG/NAME")
    can_push = is_offline() or get_token() is not None
    require(can_push, f"push_to_hub={name}: no token for the hub; run hf auth login, or set HF_TOKEN")


def push_export(folder: Path, name: str) -> str:
    """Send an exported folder to the hub, into a private repository if there is none yet, and return a message. Offline
    nothing is sent, and the message holds the command that does it later.

    Raises:
        UserError: the hub refused it; the folder is kept.
    """
    command = f"hf upload {name} {shlex.quote(str(folder))} ."
    if is_offline():
        return f"not pushed (offline): {folder} holds all of it; later: {command}"
    try:
        api = HfApi()
        api.create_repo(name, private=True, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder, commit_message="Export of a run")
    except Exception as error:  # a network failure, or the hub's refusal
        reason = get_first_line(error)
        raise UserError(f"push_to_hub={name}: not pushed ({reason}); {folder} holds all of it: {command}") from error
    return f"pushed: {constants.ENDPOINT}/{name} (new ones are private)"
