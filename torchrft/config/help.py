"""usage: python -m torchrft.train [--config_file FILE.toml] [--KEY VALUE | --SECTION.KEY VALUE] ...

  --config_file FILE.toml  read this file; flags override it
  --dry_run                validate, print the resolved TOML and the batch arithmetic, and exit
  --help, -h               print this and exit

Switches may stand alone (--bf16) or take true or false (--bf16 false). Lists take several words,
comma-separated values, or TOML: --stop '["a,b"]'. The word none unsets an option whose default is
none: --eval_data none.
"""

import textwrap

from torchrft.config.fields import FIELDS, SECTIONS, default_text, expected


def help_text() -> str:
    """All fields by section, with what they accept, their default and their text."""
    lines = [str(__doc__)]
    width = max(map(len, FIELDS)) + 4
    for section, model in SECTIONS.items():
        lines.append(f"[{section}]  {model.__doc__}")
        for name, info in model.model_fields.items():
            doc = " ".join((info.description or "").split())
            body = f"{doc} ({expected(name)}; {default_text(name)})"
            first, other = f"  {'--' + name:<{width}}", " " * (width + 2)
            lines += textwrap.wrap(body, 100, initial_indent=first, subsequent_indent=other)
        lines.append("")
    return "\n".join(lines)
