"""Keys and passwords, kept out of all files and messages: from the environment, in URLs, and of known formats."""

import os
import re
from functools import lru_cache
from urllib.parse import unquote

MASK = "***"
WORDS = "API_?KEY|KEY|TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|PAT|CREDENTIALS?|AUTH"
# GITHUB_PAT, AWS_ACCESS_KEY_ID and MYTOKEN name secrets; TOKENIZERS_PARALLELISM and PATH do not.
SECRET_NAME = re.compile(
    rf"(?:^|_)(?:{WORDS})(?:_ID|_VALUE|_HEADER)?$|(?:^|_)(?:SECRET|PASSWORD)_|(?:KEY|TOKEN|SECRET|PASSWORD|PASSWD)$",
    re.I,
)
MIN_LENGTH = 8  # secrets at least this long are masked anywhere in a text
MIN_WORD_LENGTH = 4  # shorter ones only as whole words, and only if they are not all letters
LOGIN = re.compile(r"(?<=://)[^\s/@'\"]*:?[^\s/@'\"]*@")
FORMS = (
    (LOGIN, f"{MASK}@"),
    (
        re.compile(
            r"([?&;](?:[\w.-]*(?:token|key|secret|password|signature|credential|auth)|sig|pat)=)[^&\s'\"#]+", re.I
        ),
        rf"\1{MASK}",
    ),
    (re.compile(r"\b((?:Bearer|Basic) )[\w.~+/=-]{8,}"), rf"\1{MASK}"),
    (re.compile(r"\b(?:hf_|gh[pousr]_|github_pat_|glpat-|xox[abp]-|sk-)[\w-]{16,}|\bAKIA[0-9A-Z]{16}\b"), MASK),
)
PASSWORD_IN_URL = re.compile(r"://[^\s/@]*?:([^\s/@]+)@")


def list_secrets() -> list[str]:
    """Return the secret values of the environment, the longest first: those of telling names, and URLs' passwords."""
    return find_secrets(tuple(os.environ.items()))


@lru_cache(maxsize=1)  # a study checks thousands of words in one environment
def find_secrets(variables: tuple[tuple[str, str], ...]) -> list[str]:
    """Return the secret values among variables, each a name and a value, as `list_secrets`."""
    found = set()
    for name, value in variables:
        if SECRET_NAME.search(name) and not value.startswith(("/", "~")):
            found.add(value)
        for password in PASSWORD_IN_URL.findall(value):
            found |= {password, unquote(password)}
    return sorted(found, key=len, reverse=True)


def redact_secrets(text: str) -> str:
    """Return a text without keys and passwords."""
    for value in list_secrets():
        if len(value) >= MIN_LENGTH:
            text = text.replace(value, MASK)
        elif len(value) >= MIN_WORD_LENGTH and not value.isalpha():
            text = re.sub(rf"(?<!\w){re.escape(value)}(?!\w)", MASK, text)
    for form, masked in FORMS:
        text = form.sub(masked, text)
    return text
