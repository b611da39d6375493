"""Text for people: errors, log lines and trackers. Short, on one line, and without secrets."""

import os
import re

LONGEST = 2000  # characters of an error or a log line
_WORD = r"(?:(?:api|access|private|secret).?key|(?:access|auth|hf|bearer).?token|secret|passwo?r?d)"
_SCHEME = r"[a-z][\w+.-]*://"
_USER = r"""[^"'\s:/@]*:(?!//|\d*[/?#])[^"'\s]*"""  # name:password, and no host:port/
_SECRETS = (  # the text before a secret, as a group, and the secret
    rf"""(["'](?:{_SCHEME})?){_USER}(?=@)""",
    rf"""(\b{_SCHEME})(?:[^\s"'/?#]*|{_USER})(?=@)""",
    rf"""([?&](?:[\w-]*[_-])?(?:{_WORD}|key|token|pwd|cred\w*|auth|sig(?:nature)?)=)[^\s&#"']+""",
    rf"""((?:{_WORD}|(?<![\w-])token)[\\"']*\s*[:=]\s*((?:\\*["']){{3}}|\\*["']))(?:(?!\2)(?:\\.|[^\n]))*""",
    rf"""({_WORD}(?:["']\s*[:=]|\s?=|(?<=-key):)\s?)(?:\[[^]\n]*|[^][\s"'\\,;&)}}]+)""",
    rf"""((?<![\w-])--(?:[\w.-]{{0,99}}{_WORD}|(?:\w+\.)?token)[ =]\s*)\S+""",
    r"""(authorization\\*["']?\s*[:=]\s*\\*["']?(?:(?:bearer|basic|token)\s+)?)[^\s"'\\,;]+""",
    r"(\bbearer\s+)(?-i:(?=[a-z.~+/-]*[\dA-Z_]))[\w.~+/-]{6,}=*",
)
_NAMES = re.compile(r"(?i)(?:.*_)?(?:API_KEY|TOKEN|SECRET|PASSWORD)")  # of environment variables
_known: set[str] = set()


def remember_secret(value: str) -> None:
    """From now on `redact` takes this text out, as it does what variables like HF_TOKEN hold."""
    _known.add(value)


def redact(text: str) -> str:
    """`text` with "***" in place of secrets: this process's tokens, and those of URLs and options.

    >>> redact("http://me:pass@host:1/score?api_key=abc&n=1")
    'http://***@host:1/score?api_key=***&n=1'
    """
    named = {value.strip() for name, value in os.environ.items() if _NAMES.fullmatch(name)}
    for secret in sorted((value for value in named | _known if len(value) >= 8), key=len)[::-1]:
        text = text.replace(secret, "***")
    for pattern in _SECRETS:
        text = re.sub(f"(?i){pattern}", r"\1***", text)
    return text


def is_secret(name: str, value: object) -> bool:
    """Whether an option holds a secret, as its name says, like `api_key = "sk-1"`, or its text,
    like `url = "http://me:pass@host"`. "***" stands for a secret that was taken out."""
    text = f"--{name} {value}".replace("***", "Secret1")
    return not isinstance(value, bool | float) and redact(text) != text


def shorten(text: str, limit: int = LONGEST) -> str:
    """`text`, or its beginning and end with the number of characters between them.

    >>> shorten("a" * 50 + "z" * 50, 40)
    'aaaaaaaaaaaaaaaaaaaa... (70 more characters) ...zzzzzzzzzz'
    """
    if len(text) <= limit:
        return text
    first, last = limit // 2, limit // 4
    return f"{text[:first]}... ({len(text) - first - last} more characters) ...{text[-last:]}"


def one_line(text: str) -> str:
    """`text` for a person: shortened, redacted, with line breaks as spaces and other control
    characters escaped."""
    flat = " ".join(shorten(redact(text)).split())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in flat)
