"""Keys and passwords of the environment, which no file and no message may hold."""

import os
import re

SECRET = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD|PASSWD)$", re.I)


def redact_secrets(text: str) -> str:
    """Return a text without the keys and passwords that the environment holds."""
    secret = {v for k, v in os.environ.items() if SECRET.search(k) and len(v) >= 8 and not v.startswith(("/", "~"))}
    for value in sorted(secret, key=len, reverse=True):
        text = text.replace(value, "***")
    return text
