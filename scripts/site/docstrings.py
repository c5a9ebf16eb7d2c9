"""How our docstrings are read for the site, besides what griffe knows of Google's style."""

import ast
import re

import griffe

NAMES = re.compile(r"^( +)((?:\*{0,2}\w+, )+\*{0,2}\w+):(.*(?:\n\1 +.*)*)", re.MULTILINE)
OURS = re.compile(r"(?<!`)`((?:di_refine|stylegan2_ada|torch_utils)(?:\.\w+)+)`(?!`)")


class Docstrings(griffe.Extension):
    """Gives settings their help text, and each of several arguments with one description its own."""

    def on_attribute_instance(self, *, attr, **kwargs):
        """The help of `name: type = setting(default, help)` documents it, and its default is the value."""
        call = attr.value
        if isinstance(call, griffe.ExprCall) and str(call.function) == "setting" and len(call.arguments) > 1:
            default, text = call.arguments[:2]
            try:
                attr.docstring = attr.docstring or griffe.Docstring(ast.literal_eval(str(text)), parent=attr)
            except (SyntaxError, ValueError):
                return
            attr.value = default

    def on_instance(self, *, obj, **kwargs):
        """Write `a, b: of both` as `a: of both`, `b: of both`; let names of ours in backticks be links."""
        if obj.docstring:
            text = NAMES.sub(
                lambda m: "\n".join(f"{m[1]}{name}:{m[3]}" for name in m[2].split(", ")), obj.docstring.value
            )
            obj.docstring.value = OURS.sub(r'<autoref identifier="\1" optional>`\1`</autoref>', text)
