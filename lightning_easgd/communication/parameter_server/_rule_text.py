"""A center rule as text, on its way to a stand-alone server: no code travels."""

import inspect
import json

from lightning_easgd import rules
from lightning_easgd.rules import CenterRule

__all__ = ["decode_rule", "encode_rule"]


def encode_rule(rule: CenterRule) -> str:
    """Returns a rule of ``lightning_easgd.rules`` as JSON, its class's name and its arguments: no code travels.

    Raises:
        ValueError: the rule is another one, or has an argument that JSON does not know.
    """
    kind = type(rule)
    try:
        if getattr(rules, kind.__name__, None) is not kind:
            raise TypeError("it is not in lightning_easgd.rules")
        arguments = {name: getattr(rule, name) for name in inspect.signature(kind).parameters}
        return json.dumps({"name": kind.__name__, "arguments": arguments})
    except (AttributeError, TypeError) as error:
        raise ValueError(
            f"the center rule {rule!r} cannot be sent to a stand-alone server ({error}); let a replica serve: "
            "ParameterServer() without address"
        ) from error


def decode_rule(text: str) -> CenterRule:
    """Returns the rule that ``encode_rule`` wrote.

    Raises:
        ValueError: it names no rule of ``lightning_easgd.rules``.
    """
    given = json.loads(text)
    kind = getattr(rules, given["name"], None) if given["name"] in rules.__all__ else None
    if not (inspect.isclass(kind) and issubclass(kind, CenterRule)):
        raise ValueError(f"this version of lightning_easgd has no center rule {given['name']!r}")
    rule: CenterRule = kind(**given["arguments"])
    return rule
