"""Keys and passwords, kept out of all files and messages: from the environment, in URLs, and of known formats."""

import os
import re
from functools import lru_cache
from urllib.parse import unquote

MASK = "***"
WORDS = "KEY|APIKEY|TOKEN|SECRETS?|PASSWORDS?|PASSWD|PASS|PWD|PASSPHRASE|PAT|CREDENTIALS?|AUTH|JWT|COOKIES?|WEBHOOK|DSN"
# Names of secrets have such a word as a part, numbered or not: GITHUB_PAT, AWS_ACCESS_KEY_ID, HF_TOKEN_READ, API_KEY_2;
# or end in one: MYTOKEN. TOKENIZERS_PARALLELISM and PATH do neither.
SECRET_NAME = re.compile(rf"(?:^|_)(?:{WORDS})\d*(?:_|$)|(?:KEY|TOKEN|SECRET|PASSWORD|PASSWD)\d*$", re.I)
# Names that say something of a secret, and of the current folder.
OTHER_NAME = re.compile(
    r"_(?:TYPE|MODE|METHOD|ENABLED|TTL|TIMEOUT|SIZE|LENGTH|LIMIT|COUNT|VERSION|HOST|PORT|FILE|PATH|DIR|NAME|SOCK)$|^PWD$",
    re.I,
)
ADDRESS_NAME = re.compile(r"_(?:PROXY|ENDPOINT|URL|URI)$", re.I)  # of variables whose URL may lack its scheme
MIN_LENGTH = 8  # secrets at least this long are masked anywhere in a text
MIN_WORD_LENGTH = 4  # shorter ones only as whole words, and only if they are not all letters
OPTION = (
    r"[\w-]*(?:password|passwd|passphrase|secret|(?:api|access|secret)[-_]?key)"
    r"|(?:(?:access|api|auth|bearer|github|hf|hub|id|refresh|wandb)[-_])?token"
)
# How secrets stand in a text: what stays, and what is masked. Logins in URLs come first.
FORMS = (
    (re.compile(r"(?<=://)(?:[^\s/@'\"]*|[^\s/@:'\"]+:(?!\d+/)[^\s@'\"]*)@"), f"{MASK}@"),
    (
        re.compile(
            r"([?&;#](?:[\w.-]*(?:token|key|secret|password|signature|credential|auth)|sig|pat)=)[^&\s'\"#]+", re.I
        ),
        rf"\1{MASK}",
    ),
    (re.compile(r"\b((?:Bearer|Basic) )[\w.~+/=-]{8,}"), rf"\1{MASK}"),
    (re.compile(rf"(?<![\w-])(--(?:{OPTION})(?:=|[ ](?=\S{{6}})))(?!-)\S+", re.I), rf"\1{MASK}"),
    (
        re.compile(
            r"\b((?:x-[\w-]*(?:key|token|secret|auth)|authorization)['\"]?: *['\"]?(?:\w+ )?)[^\s'\",]{8,}",
            re.I,
        ),
        rf"\1{MASK}",
    ),
    (
        re.compile(
            r"\b(?:hf_|gh[pousr]_|github_pat_|glpat-|xox[abp]-|sk-|npm_|AIza)[\w-]{16,}"
            r"|\b(?:AKIA|ASIA)[0-9A-Z]{16}\b|\beyJ[\w-]{8,}\.[\w-]{8,}(?:\.[\w-]*)?"
        ),
        MASK,
    ),
)
# The login of a URL: as the standard has it, and with a password that holds slashes or blanks.
LOGINS = (re.compile(r"://([^\s/@:?#]*)(?::([^\s/@]*))?@"), re.compile(r"://([^\s/@:]*):(?!\d+/)(.+)@"))
NO_PASSWORD = ("", "x-oauth-basic")  # beside a user's name that is the secret


def list_secrets() -> list[str]:
    """Return the secret values of the environment, the longest first: those of telling names, and URLs' passwords."""
    return find_secrets(tuple(os.environ.items()))


@lru_cache(maxsize=1)  # a study checks thousands of words in one environment
def find_secrets(variables: tuple[tuple[str, str], ...]) -> list[str]:
    """Return the secret values among variables, each a name and a value, as `list_secrets`. A file that is there is
    where a secret is, and none itself."""
    found = set()
    for name, text in variables:
        value = text.strip()
        is_place = value.startswith(("/", "~")) and os.path.exists(os.path.expanduser(value))
        if SECRET_NAME.search(name) and not OTHER_NAME.search(name) and not is_place:
            found.add(value)
        lacks_scheme = ADDRESS_NAME.search(name) and "://" not in value
        for user, password in find_logins(f"://{value}" if lacks_scheme else value):
            is_token = password in NO_PASSWORD and not user.isalpha()
            found |= {login for part in ((user,) if is_token else (password,)) for login in (part, unquote(part))}
    return sorted(found, key=len, reverse=True)


def find_logins(text: str) -> list[tuple[str, str]]:
    """Return users and passwords of the URLs in a text."""
    return [found for form in LOGINS for found in form.findall(text)]


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
