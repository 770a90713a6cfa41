"""The model card for a directory that was imported from a GGUF file: what the file says of its licence."""

from typing import Any

import yaml

from gossamer.foreign.gguf_file import GgufFile

_FIELDS = {
    "general.license": "license",
    "general.license.name": "license_name",
    "general.license.link": "license_link",
}


def model_card(file: GgufFile) -> str | None:
    """A README.md whose front matter names the licence, None where the file does not say one."""
    front: dict[str, Any] = {name: file.get(key, str) for key, name in _FIELDS.items()}
    front = {name: value for name, value in front.items() if value}
    if not front:
        return None
    title = file.get("general.name", str) or file.path.stem
    author = file.get("general.organization", str) or file.get("general.author", str)
    by = f" by {author}" if author else ""
    head = yaml.safe_dump(front, allow_unicode=True)
    return f"---\n{head}---\n\n# {title}\n\nA model{by}, imported from {file.path.name}.\n"
