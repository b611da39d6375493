"""Runs a program inside of the sandbox, and answers what torchrft asks of it.

`sandbox.py` hands this file's text to `python -c`. The program shares this process, so nothing
here is a secret and no answer is believed: it is data, which is compared where no program runs.
"""

import contextlib
import json
import math
import os
import resource
import sys
import typing

_TYPING = ("Any", "Callable", "Dict", "Iterable", "List", "Optional", "Set", "Tuple", "Union")
_MOST = 10_000  # elements of an iterator, which may have no end


def encode(value):
    """Plain data as JSON with tags: what is a subclass becomes the built-in type.

    >>> encode({1: (2, 3.0)})
    {'dict': [[1, {'tuple': [2, 3.0]}]]}
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, int):
        value = int.__index__(value)
        return value if abs(value) < 2**63 else {"int": hex(value)}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, list):
        return [encode(each) for each in value]
    if isinstance(value, dict):
        return {"dict": [[encode(key), encode(each)] for key, each in value.items()]}
    if isinstance(value, bytes | bytearray):
        return {"bytes": value.hex()}
    for kind in (tuple, set, frozenset):
        if isinstance(value, kind):
            return {kind.__name__: [encode(each) for each in value]}
    if hasattr(value, "tolist"):  # numbers and arrays of numpy
        return encode(value.tolist())
    return {"iter": [encode(each) for _, each in zip(range(_MOST), value, strict=False)]}


def limit(limits):
    """Sets the limits of this process, by the names of module `resource`."""
    for name, value in limits.items():
        kind = getattr(resource, name)
        most = resource.getrlimit(kind)[1]
        value = value if most == resource.RLIM_INFINITY else min(value, most)
        resource.setrlimit(kind, (value, value))


def module(name):
    """A new module that is `__main__` for the program, so that its classes can be pickled."""
    sys.modules["__main__"] = sys.modules[name] = made = type(sys)(name)
    return made


def run_script(program, text):
    """What the program writes as a script with `text` as its standard input; it may exit."""
    given, written = os.memfd_create("stdin"), os.memfd_create("stdout")
    with open(given, "wb", closefd=False) as file:
        file.write(text.encode())
    os.lseek(given, 0, os.SEEK_SET)
    child = os.fork()
    if child == 0:
        os.dup2(given, 0)
        os.dup2(written, 1)
        with contextlib.suppress(SystemExit):
            exec(compile(program, "response", "exec"), module("__main__").__dict__)
        raise SystemExit  # the interpreter's own end: it waits for threads and flushes
    if os.waitpid(child, 0)[1] != 0:
        raise RuntimeError("the program failed")
    return os.pread(written, os.fstat(written).st_size, 0).decode(errors="replace")


def load(program):
    """The program as a module, where standard input is empty."""
    loaded = module("response")
    scope = loaded.__dict__
    scope |= {name: getattr(typing, name) for name in _TYPING}  # as public judges import
    try:
        exec(compile(program, "response", "exec"), scope)
    except (SystemExit, EOFError):
        pass
    except Exception:
        if "stdin" not in program:  # where it reads, it fails on what is not there
            raise
    return loaded


def call(scope, names, question):
    """The value of an expression of the test; `names` are the test's own."""
    name = question.get("name")
    if name and "Solution" in scope and name not in scope:
        names[name] = getattr(scope["Solution"](), name)
    elif name:
        scope[name]  # what Python has built in is no program
    return eval(compile(question["call"], "test", "eval"), scope, names)


def main():
    with contextlib.suppress(PermissionError):  # it leads a session already
        os.setsid()  # so that killing the group does not reach what started this process
    channel, nowhere = os.dup(0), os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(nowhere, fd)
    asked = os.fdopen(channel, "rb")
    program, limits = json.loads(asked.readline())
    limit(limits)
    os.write(channel, b"ready\n")
    names: dict[str, object] = {"math": math, "inf": math.inf, "nan": math.nan}
    answer: object = None
    loaded = None
    for line in asked:
        token, question = json.loads(line)
        try:
            if "stdin" in question:
                answer = run_script(program, question["stdin"])
            else:
                if loaded is None:
                    loaded = names["__program__"] = load(program)
                scope = loaded.__dict__
                if "call" in question:
                    answer = encode(call(scope, names, question))
                elif "setup" in question:
                    exec(compile(question["setup"], "test", "exec"), scope, names)
                else:
                    exec(compile(question["run"], "test", "exec"), scope)
                    answer = True
            text = json.dumps([token, answer])
        except BaseException:
            if os.getpid() != parent:
                raise
            text = json.dumps([token])
        data = (text + "\n").encode()
        while data:
            data = data[os.write(channel, data) :]


parent = os.getpid()
main()
