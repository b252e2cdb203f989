#!/usr/bin/env python3
"""Makes C++ of CUDA C++: translate.py IN OUT.

Text for text, line for line, and only what the headers of device/ cannot give:
  k<<<grid, block>>>(...)               emu::configure(k, grid, block)(...)
  cudaLaunchKernelEx(                   emu::launch_ex(
  __shared__ T a, b[8];                 a struct of them, and references into this block's own
  extern __shared__ T a[];              T *const a = ... in this block's own
  __global__ void __launch_bounds__(n) k(...) {   void k(...) { and a first line that answers what
                                        a launch has to know: the name, n, the cluster
"""
import re
import sys

OPEN, CLOSE = "([{", ")]}"


class Failure(Exception):
    pass


def blanked(text):
    """`text` with comments, strings and characters as blanks of the same length."""
    pattern = r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])+\''
    return re.sub(pattern, lambda m: re.sub(r"[^\n]", " ", m.group()), text, flags=re.S)


def closing(text, at):
    """The index of what closes the bracket at `at`."""
    depth = 0
    for i in range(at, len(text)):
        if text[i] in OPEN:
            depth += 1
        elif text[i] in CLOSE:
            depth -= 1
            if depth == 0:
                return i
    raise Failure(f"nothing closes the bracket in: {text[at:at + 60]!r}")


def skip_back_over_arguments(text, end):
    """Where the template's arguments that end before `end` begin, or `end` if there are none."""
    if text[end - 1] != ">":
        return end
    depth = 0
    for i in range(end - 1, -1, -1):
        if text[i] == ">":
            depth += 1
        elif text[i] == "<":
            depth -= 1
            if depth == 0:
                return i
    raise Failure("template arguments without a beginning")


def split_top(text, separator=","):
    """Parts of `text` at separators that are in no brackets."""
    parts, depth, start = [], 0, 0
    for i, c in enumerate(text):
        if c in OPEN or c == "<":
            depth += 1
        elif c in CLOSE or c == ">":
            depth -= 1
        elif c == separator and depth == 0:
            parts.append(text[start:i])
            start = i + 1
    return parts + [text[start:]]


def launches(text):
    while True:
        code = blanked(text)
        at = code.find("<<<")
        if at < 0:
            return text
        end = code.index(">>>", at)
        name_end = len(code[:at].rstrip())
        start = skip_back_over_arguments(code, name_end)
        name = re.search(r"[A-Za-z_]\w*$", code[:start])
        if not name:
            raise Failure(f"a launch of what? {text[at - 40:at]!r}")
        kernel, gap = text[name.start():name_end], text[name_end:at]
        text = (text[:name.start()] + f"emu::configure({kernel},{gap}" + text[at + 3:end] + ")" +
                text[end + 3:])


def declared_names(declarators):
    names = []
    for declarator in split_top(declarators):
        name = re.match(r"\s*([A-Za-z_]\w*)\s*(\[.*)?$", declarator, re.S)
        if not name:
            raise Failure(f"a shared variable as in {declarator!r}")
        names.append(name.group(1))
    return names


def shared(text):
    """Declarations of shared memory."""
    counter = 0
    pattern = re.compile(r"\b(extern\s+)?__shared__\s+(__align__\(\s*\d+\s*\)\s+)?([^;]*);")
    while True:
        found = pattern.search(blanked(text))
        if not found:
            return text
        outer, align, _ = found.groups()
        align = align or ""
        declaration = text[found.start(3):found.end(3)]
        # The type: all up to the first declarator, which is what the first comma or the end is behind.
        first = split_top(declaration)[0]
        head = re.match(r"(.*?[\s*&>])([A-Za-z_]\w*)\s*(\[.*)?$", first, re.S)
        if not head:
            raise Failure(f"a shared variable as in {declaration!r}")
        kind, declarators = head.group(1), declaration[head.start(2):]
        if outer:
            bytes_ = re.search(r"\d+", align)
            alignment = bytes_.group() if bytes_ else f"alignof({kind.strip()})"
            name = declared_names(declarators)[0]
            new = f"{kind}*const {name} = ({kind}*)emu::dynamic_shared({alignment});"
        else:
            counter += 1
            own, names = f"emu_shared_{counter}", declared_names(declarators)
            new = (f"struct {own} {{ {align}{declaration}; }}; " +
                   f"{own} &{own}_here = emu::shared_variable<{own}>(); " +
                   " ".join(f"auto &{n} = {own}_here.{n};" for n in names))
            lines = text[found.start():found.end()].count("\n") - new.count("\n")
            new += "\n" * lines
        text = text[:found.start()] + new + text[found.end():]


def kernels(text):
    """Heads of kernels."""
    at = 0
    while True:
        code = blanked(text)
        at = code.find("__global__", at)
        if at < 0:
            return text
        line = code.rfind("\n", 0, at) + 1
        if code[line:at].lstrip().startswith("#"):
            at += 1
            continue
        facts, i = "", at + len("__global__")
        text = text[:at] + " " * (i - at) + text[i:]
        # Up to the parameters: the bracket behind a name that is no attribute.
        while True:
            bracket = code.index("(", i)
            name = re.search(r"(\w+)\s*$", code[:bracket])
            end = closing(code, bracket)
            arguments = text[bracket + 1:end]
            if name.group(1) == "__launch_bounds__":
                facts += f".bounds({arguments})"
            elif name.group(1) in ("QV_CLUSTER", "__cluster_dims__"):
                facts += f" {name.group(1)}({arguments})"
            else:
                break
            removed = text[name.start():end + 1]
            text = text[:name.start()] + re.sub(r"[^\n]", " ", removed) + text[end + 1:]
            i = end + 1
        rest = code[end + 1:].lstrip()
        if rest.startswith(";"):
            continue
        if not rest.startswith("{"):
            raise Failure(f"a kernel without a body: {name.group(1)}")
        body = code.index("{", end) + 1
        first = f' if (emu::facts("{name.group(1)}"){facts}.asked()) return;'
        text = text[:body] + first + text[body:]


def translate(text, path):
    text = launches(text)
    text = re.sub(r"\bcudaLaunchKernelEx\s*\(", "emu::launch_ex(", text)
    text = kernels(shared(text))
    return f'#line 1 "{path}"\n' + text


def main():
    source, target = sys.argv[1:]
    with open(source, encoding="utf-8") as f:
        text = f.read()
    try:
        text = translate(text, source)
    except Failure as failure:
        sys.exit(f"translate.py: {source}: {failure}")
    with open(target, "w", encoding="utf-8") as f:
        f.write(text)


if __name__ == "__main__":
    main()
