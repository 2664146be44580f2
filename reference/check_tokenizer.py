"""Compares our tokenizer with sentencepiece on at least ten thousand lines of mixed scripts.

    python reference/check_tokenizer.py --binary target/release/idefics --model DIR [FILE...]

DIR is a checkpoint directory with `tokenizer.model`. The lines are those of the given files, or of what this system
has: licence texts, translated messages of gettext catalogues in every installed language, and generated lines of
random characters of every script. `idefics inspect DIR --tokenize FILE` must print one JSON array of ids a line.
"""

import argparse
import gettext
import json
import subprocess
import sys
import tempfile
import unicodedata
from pathlib import Path

import numpy as np
import sentencepiece

MINIMUM = 10_000
PER_LANGUAGE = 150
GENERATED = 6_000
# The processor splits these out before the tokenizer sees the rest, so a line may not hold them.
SPECIAL = ("<s>", "</s>", "<unk>", "<image>", "<fake_token_around_image>", "<end_of_utterance>")


def clean(lines) -> list[str]:
    """One line each, no special tokens, no control character that ends a line anywhere."""
    kept = []
    for line in lines:
        line = line.replace("\r", "").strip("\n")
        if line and not any(token in line for token in SPECIAL) and "\n" not in line and "\0" not in line:
            kept.append(line)
    return kept


def licence_lines() -> list[str]:
    paths = sorted(Path("/usr/share/common-licenses").glob("*"))
    return clean(line for path in paths for line in path.read_text(errors="ignore").split("\n"))


def catalogue_lines() -> list[str]:
    by_language: dict[str, list[str]] = {}
    for path in sorted(Path("/usr/share/locale").glob("*/LC_MESSAGES/*.mo")):
        lines = by_language.setdefault(path.parts[4], [])
        if len(lines) < PER_LANGUAGE:
            try:
                with path.open("rb") as file:
                    catalogue = gettext.GNUTranslations(file)._catalog
            except (OSError, UnicodeDecodeError, ValueError):
                continue
            messages = [text for key, text in catalogue.items() if key and isinstance(text, str)]
            lines += clean(line for text in messages for line in text.split("\n"))[: PER_LANGUAGE - len(lines)]
    return [line for lines in by_language.values() for line in lines]


def generated_lines(count: int, seed: int) -> list[str]:
    """Runs of characters of one script, spaces and tabs in runs, digits, marks, rare planes, joined emoji."""
    generator = np.random.default_rng(seed)
    scripts: dict[str, list[str]] = {}
    for point in [*range(0x20, 0xD800), *range(0xF900, 0x1FB00), *range(0x20000, 0x20400)]:
        character = chr(point)
        if unicodedata.category(character)[0] in "LMNPS":
            scripts.setdefault(unicodedata.name(character, "?").split(" ")[0], []).append(character)
    names = [name for name, characters in scripts.items() if len(characters) >= 8]
    separators = [" ", " ", " ", "  ", "   ", "\t", "\u00a0", "\u3000", "\u200d", "\ufe0f", ""]
    lines = []
    for _ in range(count):
        parts = []
        for _ in range(int(generator.integers(1, 9))):
            characters = scripts[names[generator.integers(len(names))]]
            picked = generator.integers(len(characters), size=int(generator.integers(1, 8)))
            parts.append("".join(characters[index] for index in picked))
            parts.append(separators[generator.integers(len(separators))])
        lines.append(separators[generator.integers(len(separators))] + "".join(parts))
    return clean(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--binary", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minimum", type=int, default=MINIMUM, help="fail when there are fewer lines than this")
    parser.add_argument("files", type=Path, nargs="*")
    arguments = parser.parse_args()

    if arguments.files:
        lines = clean(line for path in arguments.files for line in path.read_text(encoding="utf-8").split("\n"))
    else:
        lines = licence_lines() + catalogue_lines() + generated_lines(GENERATED, arguments.seed)
    if len(lines) < arguments.minimum:
        sys.exit(f"only {len(lines)} lines; at least {arguments.minimum} are needed: name more files")

    with tempfile.NamedTemporaryFile("w", suffix=".txt", encoding="utf-8", newline="\n") as file:
        file.write("".join(line + "\n" for line in lines))
        file.flush()
        command = [arguments.binary, "inspect", arguments.model, "--tokenize", file.name]
        run = subprocess.run([str(part) for part in command], stdout=subprocess.PIPE)
    if run.returncode:
        sys.exit(f"{arguments.binary} inspect ended with {run.returncode}")
    ours = [json.loads(line) for line in run.stdout.decode().splitlines()]
    if len(ours) != len(lines):
        sys.exit(f"{len(lines)} lines in, {len(ours)} out")

    processor = sentencepiece.SentencePieceProcessor(model_file=str(arguments.model / "tokenizer.model"))
    different = [
        (line, got, expected)
        for line, got, expected in zip(lines, ours, processor.encode(lines))
        if got != expected
    ]
    for line, got, expected in different[:10]:
        print(f"{line!r}\n  ours          {got}\n  sentencepiece {expected}")
    scripts = {unicodedata.name(character, "?").split(" ")[0] for line in lines for character in line if character.isalpha()}
    print(f"{len(lines)} lines, {len(scripts)} scripts, {len(different)} different")
    sys.exit(1 if different else 0)


if __name__ == "__main__":
    main()
