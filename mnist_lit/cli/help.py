"""``--help``: the configuration's YAML files with their comments."""

from pathlib import Path

from mnist_lit.cli.config import CONF


def help_text(name: str, overrides: list[str], user_folder: str | None = None) -> str:
    """``<name>.yaml`` and, of its groups, the files that ``overrides`` choose.

    Args:
        user_folder: The folder of ``--config-dir``, whose files come after this project's.
    """
    import yaml

    folders = [CONF, *([Path(user_folder)] if user_folder else [])]

    def text_of(path: str) -> str | None:
        found = next((file for folder in folders if (file := folder / f"{path}.yaml").is_file()), None)
        return found.read_text(encoding="utf-8").rstrip() if found else None

    text = text_of(name)
    if text is None:
        return f"there is no {name}.yaml in {' or '.join(map(str, folders))}"
    chosen = dict(override.split("=", 1) for override in overrides if "=" in override)
    files = [*chosen.items()]
    for folder, file in files:  # an experiment chooses others, and may begin with another experiment
        for entry in (yaml.safe_load(text_of(f"{folder}/{file}") or "") or {}).get("defaults", []):
            if isinstance(entry, dict):
                for other, choice in entry.items():
                    chosen.setdefault(other.removeprefix("override /"), choice)
            elif entry != "_self_":
                files.append((folder, entry))
    parts = [text]
    for entry in (yaml.safe_load(text) or {}).get("defaults", []):
        if isinstance(entry, str) and entry != "_self_":
            parts.append(f"# ---- {entry}\n\n{help_text(entry, overrides, user_folder)}")
        for group, default in entry.items() if isinstance(entry, dict) else ():
            if group.startswith("override"):
                continue
            group = group.removeprefix("optional ")
            option = chosen.get(group, default)
            options = sorted({path.stem for folder in folders for path in (folder / group).glob("*.yaml")})
            if not options:  # an optional group of the user's own
                continue
            parts.append(f"# ---- {group}: {option or 'none'}  (there are {', '.join(options)})")
            several = option.strip("[]").split(",") if isinstance(option, str) else option or []
            for body in [text_of(f"{group}/{each.strip()}") for each in several]:
                if body:
                    is_global = body.startswith("# @package _global_")
                    parts.append(body if is_global else f"{group}:\n  " + body.replace("\n", "\n  "))
    return "\n\n".join(parts)
