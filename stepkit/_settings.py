"""What a user writes in YAML: the profiles, and ``KEY=VALUE`` on the command line."""

import re

import yaml

from stepkit._checks import require

MOST_SIGNS, MOST_LEVELS = 100_000, 20  # of a text: a profile has 2,000 and 3


class _Loader(yaml.SafeLoader):
    """YAML of plain values, with 1e-3 and None, which YAML 1.1 takes for words.

    Aliases, which unfold without end, and deep nesting are refused.
    """

    level = 0

    def compose_node(self, parent, index):
        found = self.peek_event()
        deep = self.level == MOST_LEVELS
        if deep or isinstance(found, yaml.AliasEvent):
            told = f"more than {MOST_LEVELS} levels" if deep else "an alias"
            raise yaml.MarkedYAMLError(problem=told, problem_mark=found.start_mark)
        self.level += 1
        node = super().compose_node(parent, index)
        self.level -= 1
        return node


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), "-+.0123456789"
)
_Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile("None$"), "N")


def read_yaml(where: str, text: str):
    """Return what YAML of plain values says; a tag that would make an object is refused."""
    require(len(text) <= MOST_SIGNS, where, f"{len(text)} characters", f"at most {MOST_SIGNS}")
    try:
        return yaml.load(text, _Loader)
    # beyond YAMLError: the 32nd of a month, and tags on values that do not fit them
    except (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError) as error:
        told = " ".join(str(error).split())
        raise ValueError(f"{where}: expected YAML of plain values ({told})") from None


def read_settings(texts) -> dict:
    """Return the values of ``KEY=VALUE``; a text may hold several, with blanks between.

    A blank ends a value only before the next key, and where what stands before it is YAML: not
    inside brackets or quotes.

    Examples
    --------
    >>> read_settings(["seed=1 areas=[.1, 2e-1]", "video=/my clips/a=b.mp4"])
    {'seed': 1, 'areas': [0.1, 0.2], 'video': '/my clips/a=b.mp4'}
    """
    given = {}
    for text in texts:
        pair = ""
        for part in re.split(r"(?<!\s)(?=\s+\w+\s*=)", text.strip()):
            pair += part
            key, equals, value = (word.strip() for word in pair.partition("="))
            require(bool(equals), "--set", repr(pair), "key=value")
            try:
                given[key], pair = read_yaml(f"--set {key}", value), ""
            except ValueError as error:  # the blank may stand inside brackets or quotes
                wrong = error
        if pair:
            raise wrong
    return given
