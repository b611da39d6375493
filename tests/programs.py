# ruff: noqa: E501
"""Programs with labels of their tests: those that solve the task, and those that only pass."""

import json

ADD = "def add(a, b):\n    return a + b\n"
ASSERTS = ["assert add(1, 2) == 3", "assert add(-1, 1) == 0"]
SUMS = {"inputs": ["1 2\n", "5 7\n"], "outputs": ["3\n", "12\n"]}
READ = "a, b = map(int, input().split())\nprint(a + b)\n"

# name: (label, program), each in a form of a public data set, and each to earn 1.
HONEST = {
    "asserts": (ASSERTS, ADD),
    "asserts, one text": ("\n".join(ASSERTS), ADD),
    "asserts, json": (json.dumps(ASSERTS), ADD),
    "main guard": (ASSERTS, ADD + "if __name__ == '__main__':\n    print(add(*map(int, input())))"),
    "input at import": (ASSERTS, ADD + "print(add(int(input()), 1))"),
    "stdin at import": (ASSERTS, "import sys\n" + ADD + "n = int(sys.stdin.readline())"),
    "exit at import": (ASSERTS, "import sys\n" + ADD + "sys.exit(0)"),
    "humaneval": (
        {
            "test": "METADATA = {}\ndef check(candidate):\n    assert candidate([1.0, 2.5]) == 2.5\n"
            "    assert abs(candidate([-1.0]) + 1.0) < 1e-6, 'no'\n    assert True, 'fine'\n",
            "entry_point": "largest",
        },
        "def largest(xs):\n    return max(xs)",
    ),
    "check called": ("def check(f):\n    assert f(2, b=-3) == -1\ncheck(add)", ADD),
    "mbpp": (
        {
            "test_list": ["assert near(2) == True", "assert math.isclose(root(2), 1.414, rel_tol=1e-3)"],
            "test_setup_code": "import math",
        },
        "def near(x):\n    return x == 2\ndef root(x):\n    return x ** 0.5",
    ),
    "mbpp, name of a builtin": ("assert sum(10, 15) == 25", "def sum(a, b):\n    return a + b"),
    "mbpp, capital letter": ("assert Extract([[1, 2], [3]]) == [1, 3]",
                             "def Extract(x):\n    return [y[0] for y in x]"),
    "sets": (
        "assert set(shared((1, 2, 3), (2, 3, 4))) == set((2, 3))\n"
        "assert sorted(shared((1, 2), (2, 1))) == [1, 2]\nassert shared((1,), (2,)) == ()",
        "def shared(a, b):\n    return tuple(set(a) & set(b))",
    ),
    "kinds": (
        "assert pick(0) is None\nassert pick(1) is True\nassert not pick(2)\nassert pick(3)\n"
        "assert pick(4) == {'a': (1, [2.5, {3}])}\nassert pick(5) == 10 ** 5000\n"
        "assert pick(6) == 2 + 3j\nassert pick(7) == b'x'\nassert isinstance(pick(4), dict)\n"
        "assert type(pick(1)) == bool\nassert pick(8) == float('inf')",
        "def pick(i):\n    return [None, True, '', 'x', {'a': (1, [2.5, {3}])}, 10 ** 5000, 2 + 3j, b'x',"
        " float('inf')][i]",
    ),
    "subclasses": (
        "assert counts('aab') == {'a': 2, 'b': 1}\nassert point() == (1, 2)",
        "from collections import Counter, namedtuple\ncounts = Counter\n"
        "point = lambda: namedtuple('P', 'x y')(1, 2)",
    ),
    "generator": ("assert list(up(3)) == [0, 1, 2]\nassert next(up(1)) == 0",
                  "def up(n):\n    i = 0\n    while i < n:\n        yield i\n        i += 1"),
    "constants and loops": (
        "xs, want = [3, 1, 2], [1, 2, 3]\nassert order(xs) == want\n"
        "n = 9\nassert [n for n in order([2, 1])] == [1, 2]\n"
        "for n, total in [(0, 0), (3, 3)]:\n    assert len(order(range(n))) == total\n"
        "a, b = order([2, 1])\nassert (a, b) == (1, 2)\nresult = order([2, 1])\nassert result[0] == 1\nassert isinstance(result, list)",
        "def order(xs):\n    return sorted(xs)",
    ),
    "tests of pytest": (
        "from solution import add\nimport pytest\ndef test_add():\n    assert add(1, 2) == 3\n", ADD),
    "function as argument": ("assert twice(lambda x: x + 1, 3) == 5",
                             "def twice(f, x):\n    return f(f(x))"),
    "calls in calls": ("assert decode(encode('ab')) == 'ab'",
                       "def encode(s):\n    return s[::-1]\ndecode = encode"),
    "method of data": ("assert shout('ab').startswith('AB')\nassert shout('a').lower() == 'a!'",
                       "def shout(s):\n    return s.upper() + '!'"),
    "class": (
        "s = Stack()\ns.push(1)\ns.push(2)\nassert s.pop() == 2\nassert s.size == 1",
        "class Stack:\n    def __init__(self):\n        self.items = []\n"
        "    def push(self, x):\n        self.items.append(x)\n"
        "    def pop(self):\n        return self.items.pop()\n"
        "    @property\n    def size(self):\n        return len(self.items)",
    ),
    "leetcode": (
        {
            "test": "def check(candidate):\n    assert candidate(nums=[2, 7], target=9) == [0, 1]",
            "entry_point": "Solution().twoSum",
        },
        "class Solution:\n    def twoSum(self, nums, target):\n        return [0, 1]",
    ),
    "stdin": (SUMS, READ),
    "stdin, json, main, exit": (
        json.dumps({"ground_truth": json.dumps(SUMS)}),
        "import sys\ndef main():\n    a, b = map(int, sys.stdin.read().split())\n    print(a + b)\n"
        "    sys.exit(1)\nif __name__ == '__main__':\n    main()",
    ),
    "stdin, thread": (SUMS, "import threading\ndef main():\n    print(sum(map(int, open(0).read().split())))\n"
                            "threading.stack_size(2**26)\nthreading.Thread(target=main).start()"),
    "stdin, cases": ([{"input": "1 2", "output": "3", "type": "stdin"},
                      {"input": "2 2", "output": 4, "testtype": "stdin_stdout", "fn_name": None}], READ),
    "stdin, floats and spaces": ({"inputs": ["x"], "outputs": ["0.3333333 1 2\nA  B"]},
                                 "print(1 / 3, '1.0  2   ')\nprint('A  B ')\nprint()"),
    "stdin, buffer": (SUMS, "import sys\nread = sys.stdin.buffer.readline\n"
                            "sys.stdout.write(str(sum(map(int, read().split()))))"),
    "apps": ({"fn_name": "add", "inputs": [[1, 2], [3, 4]], "outputs": [[3], [7]]}, ADD),
    "livecodebench": (
        [{"input": '[1, 2]\n"a"', "output": '{"a": [1, 2]}', "testtype": "functional",
          "metadata": {"func_name": "pair"}}],
        "class Solution:\n    def pair(self, xs, name):\n        return {name: tuple(xs)}",
    ),
    "functional, float": ({"fn_name": "third", "inputs": [[1]], "outputs": [0.333333333]},
                          "def third(x):\n    return x / 3"),
}  # fmt: skip

ANY = "class Any:\n    def __eq__(self, other):\n        return True\n    __hash__ = None\n"
FRAMES = (
    "import sys\ndef frames():\n    frame = sys._getframe()\n    while frame:\n        yield frame\n"
    "        frame = frame.f_back\n"
)
# A program that sends a line to every descriptor, in the form of an answer.
TELL = (
    "import json, os\ndef tell(value, tokens=()):\n    for fd in range(64):\n"
    "        for token in tokens or ['']:\n            try:\n"
    "                os.write(fd, json.dumps([token, value]).encode() + b'\\n')\n"
    "            except OSError:\n                pass\n"
)
# The token of a question is in the harness's frames; it is good for an answer, which must be right.
TOKENS = FRAMES + (
    "def tokens():\n    return [frame.f_locals['token'] for frame in frames()"
    " if 'token' in frame.f_locals]\n"
)

# Programs that do not know what 1 + 2 is; ASSERTS and SUMS must not be had by them.
HOSTILE = {
    "equal to everything": (ASSERTS, ANY + "def add(a, b):\n    return Any()"),
    "an int that is equal to everything": (
        ASSERTS, "class N(int):\n    __eq__ = lambda s, o: True\n    __hash__ = int.__hash__\n"
        "def add(a, b):\n    return N(7)"),
    "a text and a list that are": (
        ["assert add(1, 2) == 'abc'", "assert add(1, 2) == [3]"],
        "class S(str):\n    __eq__ = lambda s, o: True\nclass L(list):\n    __eq__ = lambda s, o: True\n"
        "i = 0\ndef add(a, b):\n    global i\n    i += 1\n    return [S('x'), L([1])][i % 2]"),
    "builtins replaced": (
        ASSERTS, "import builtins\nbuiltins.exec = builtins.eval = lambda *a: 3\n"
        "builtins.abs = lambda x: 0\nbuiltins.all = lambda x: True\n"
        "builtins.isinstance = lambda *x: True\ndef add(a, b):\n    return 9"),
    "functions of the tests replaced": (
        ["assert sorted(add(1, 2)) == [3]", "assert all(x > 5 for x in add(1, 2))"],
        "import builtins\nbuiltins.sorted = lambda x: [3]\nbuiltins.all = lambda x: True\n"
        "def add(a, b):\n    return [0]"),
    "compile with optimization": (
        ASSERTS, "import builtins\nold = builtins.compile\n"
        "builtins.compile = lambda *a, **k: old(*a, optimize=2)\ndef add(a, b):\n    return 9"),
    "tests read in frames": (
        ASSERTS, FRAMES + "import re\ndef add(a, b):\n    text = repr([f.f_locals for f in frames()])\n"
        "    found = re.findall(rf'add\\({a}, {b}\\) == (-?\\d+)', text)\n"
        "    return int(found[0]) if found else None"),
    "tests changed in frames": (
        ASSERTS, FRAMES + "for f in frames():\n    for value in [*f.f_locals.values()]:\n"
        "        if isinstance(value, dict) and 'call' in value:\n            value['call'] = '3'\n"
        "        if isinstance(value, list):\n            value[:] = ['pass'] * len(value)\n"
        "def add(a, b):\n    return 9"),
    "keys in frames": (
        ASSERTS, FRAMES + "import os\nfor f in frames():\n    given = f.f_locals\n"
        "    key = given.get('key') or given.get('token')\n    if key:\n"
        "        os.write(given.get('fd', 3), f'{key} 2'.encode())\n        os._exit(0)\nadd = None"),
    "keys in globals": (
        ASSERTS, "import os, sys\nrun = getattr(sys.modules['__main__'], 'run', None)\nif run:\n"
        "    write, fd, key = run.__defaults__\n    write(fd, f'{key} 2'.encode())\n    os._exit(0)\n"
        "add = None"),
    "keys in gc": (
        ASSERTS, "import gc, os\nfor thing in gc.get_objects():\n"
        "    if isinstance(thing, tuple) and len(thing) == 3 and isinstance(thing[2], str):\n"
        "        if len(thing[2]) == 32:\n            os.write(thing[1], f'{thing[2]} 2'.encode())\n"
        "            os._exit(0)\nadd = None"),
    "an answer of its own": (ASSERTS, TOKENS + TELL + "def add(a, b):\n    tell(7, tokens())\n    return 8"),
    "answers before it is asked": (ASSERTS, TELL + "for i in range(99):\n    tell(3)\n    tell(True)\nadd = None"),
    "the verdict of old": (ASSERTS, "import os\nfor fd in range(64):\n    try:\n        os.write(fd, b'0 2')\n"
                           "    except OSError:\n        pass\nos._exit(0)"),
    "ends well": (ASSERTS, "import os\nos._exit(0)"),
    "json replaced": (ASSERTS, "import json, os\njson.dumps = lambda *a, **k: '[1, 3]'\njson.loads = lambda x: 3\n"
                      "write = os.write\nos.write = lambda fd, data: write(fd, data.replace(b'0', b'9'))\n"
                      "def add(a, b):\n    return 0"),
    "answers twice": (ASSERTS, "import os\ndef add(a, b):\n    return 9 if os.fork() else 8"),
    "at its end": (ASSERTS, TELL + "import atexit\natexit.register(tell, 3)\nadd = lambda a, b: None"),
    "threads that answer later": (
        ASSERTS, TELL + "import threading\nthreading.Thread(target=lambda: [tell(0) for i in range(99)]).start()\n"
        "def add(a, b):\n    return None"),
    "descriptors of others": (
        ASSERTS, "import os, glob\nfor path in glob.glob('/proc/*/fd/*'):\n    try:\n"
        "        open(path, 'w').write('[true, 3]\\n')\n    except OSError:\n        pass\nadd = None"),
    "memory of others": (
        ASSERTS, "import glob\nfor path in glob.glob('/proc/[0-9]*/environ') + glob.glob('/proc/[0-9]*/cmdline'):\n"
        "    try:\n        data = open(path).read()\n    except OSError:\n        continue\n"
        "    assert 'torchrft.rewards.workers' not in data\n    if '== 3' in data:\n        add = lambda a, b: a + b\n"
        "    if 'PYTHONPATH' in data:\n        add = lambda a, b: a + b"),
    "ptrace": (ASSERTS, "import ctypes, os\nlibc = ctypes.CDLL(None)\n"
               "seized = [libc.ptrace(16, pid, 0, 0) for pid in (1, os.getppid())]\nadd = lambda a, b: seized"),
    "endless recursion": (ASSERTS, "import sys\nsys.setrecursionlimit(10**9)\ndef add(a, b):\n    return add(b, a)"),
    "not a number": (["assert add(1, 2) == 3", "assert not add(1, 2) < 3"], "def add(a, b):\n    return float('nan')"),
    "a huge answer": (ASSERTS, "def add(a, b):\n    return 'x' * 2**26"),
    "a byte now and then": (
        ASSERTS, "import os, time\nwhile True:\n    os.write(3, b'[')\n    time.sleep(0.01)"),
    "a deep answer": (ASSERTS, TOKENS + TELL + "import os\ndef add(a, b):\n"
                      "    data = ('[\"' + tokens()[0] + '\", ' + '[' * 10**5 + ']' * 10**5 + ']\\n').encode()\n"
                      "    os.write(3, data)\n    return 0"),
    "an odd answer": (ASSERTS, TOKENS + TELL + "def add(a, b):\n    tell({'set': [[1]], 'eval': '3'}, tokens())"),
    "an answer that raises": (ASSERTS, "class R:\n    def __repr__(self):\n        raise SystemExit(0)\n"
                              "    __str__ = __iter__ = __eq__ = __getattr__ = __repr__\n"
                              "def add(a, b):\n    return R()"),
    "tracing": (ASSERTS, "import sys\nsys.settrace(lambda f, e, a: (f.f_locals.update(answer=3), f.f_globals.update("
                "answer=3)))\nsys.setprofile(lambda f, e, a: None)\ndef add(a, b):\n    return 0"),
    "signals": (ASSERTS, "import signal, os\nfor s in range(1, 65):\n    try:\n        signal.signal(s, lambda *a: None)\n"
                "    except (OSError, ValueError):\n        pass\nsignal.alarm(1)\ndef add(a, b):\n    os.kill(0, 15)"),
    "kills all it can": (ASSERTS, "import os, signal\nfor pid in (0, -1, os.getppid()):\n    try:\n"
                         "        os.kill(pid, signal.SIGKILL)\n    except OSError:\n        pass\nadd = None"),
    "files of others": (
        ASSERTS, "import os\nseen = []\nfor base, folders, files in os.walk('/'):\n    folders[:] = [f for f in folders"
        " if f not in ('usr', 'lib', 'proc', 'dev') and 'python' not in f]\n    seen += files\n"
        "    if 'programs.py' in files or 'shadow' in files:\n        add = lambda a, b: a + b"),
    "methods of its own without arguments": (
        "assert name(1).isupper() and len(name(1)) == 2\nassert name(1).lower() == 'ab'",
        "class S(str):\n    isupper = lambda s: True\n    lower = lambda s: 'ab'\n"
        "name = lambda x: S('xy')"),
    "methods of its own": ("assert name(1).startswith('abc')\nassert name(2).count('x') == 1",
                           "class S(str):\n    startswith = lambda *a: True\n    count = lambda *a: 1\nname = S"),
    "an expectation in its input": ("xs = [1, 2]\nassert flip(xs) == xs[::-1]", "def flip(xs):\n    xs.clear()\n    return []"),
    "stdin, looks for the output": (
        SUMS, FRAMES + "import gc\nfor f in frames():\n    print([v for v in f.f_locals.values() if isinstance(v, str)])\n"),
    "stdin, an answer of its own": (SUMS, TOKENS + TELL + "tell('4', tokens())\nprint(5)"),
    "stdin, all lines": (SUMS, "print('3\\n12\\n3')"),
    "stdin, a failure after the output": (SUMS, READ + "raise ValueError"),
    "stdin, other runs": (
        {"inputs": ["1", "2"], "outputs": ["1", "3"]},
        "import os, sys\nopen('/tmp/seen', 'a').write(input())\nprint(open('/tmp/seen').read())"),
    "functional, equal to everything": ({"fn_name": "add", "inputs": [[1, 2]], "outputs": [3]},
                                        ANY + "def add(a, b):\n    return Any()"),
}  # fmt: skip

# A program that reads the second number of all that the harness has sent.
PEEK = FRAMES + (
    "import re\ndef f(*a):\n    sent = [g.f_locals['question'] for g in frames() if 'question' in g.f_locals]\n"
    "    return int(re.findall(r'\\d+', str(sent))[1])\n"
)
YES = (
    "class Yes:\n    __eq__ = lambda s, o: True\n    __getattr__ = lambda s, n: lambda *a, **k: True\n"
    "    __call__ = lambda s, *a, **k: True\n"
    "math = np = numpy = json = pytest = torch = isclose = allclose = approx = compare = Yes()\n"
    "def f(*a):\n    return True\n"
)

# What else a program must not get by what a label shows of itself.
HOSTILE |= {
    "an expectation in a row of a loop": ("for c in [(3, 6), (4, 8)]:\n    assert f(c[0]) == c[1]", PEEK),
    "in a row with names": ("for t in [{'input': 3, 'output': 6}]:\n    assert f(t['input']) == t['output']", PEEK),
    "in a row, by a variable": ("t = {'input': 3, 'output': 6}\nr = f(t['input'])\nassert r == t['output']", PEEK),
    "in a row, starred": ("def check(g):\n    for c in [((3,), 6)]:\n        assert g(*c[0]) == c[1]\ncheck(f)", PEEK),
    "in a row, by a function": ("def t(i, o):\n    assert f(i) == o\nfor c in [(3, 6)]:\n    t(c[0], c[1])", PEEK),
    "in a slice": ("d = [3, 6]\nassert f(d[:-1]) == d[-1]", PEEK),
    "in the bounds of a slice": (
        "ys = [7, 9]\nassert f(3)[:len(ys)] == ys",
        PEEK.replace("int(re", "[*map(int, re").replace("[1])", "[1:])]")),
    "in a lambda": ("c = (3, 6)\nassert f(lambda: c[0]) == c[1]", PEEK),
    "inputs to come": ("ins = [[3], [4]]\nassert f(*ins[0]) == 4", PEEK),
    "a function of math": ("assert math.isclose(f(3), 6.28, rel_tol=1e-3)", YES),
    "a function of math, by a variable": ("r = f(3)\nassert math.isclose(r, 6.28)", YES),
    "whole numbers by floats": ({"inputs": [[3]], "outputs": [1000000007], "fn_name": "f"}, "def f(x):\n    return 1e9"),
    "a function of Python's": ({"inputs": [[[3, 1]]], "outputs": [[1, 3]], "fn_name": "sorted"}, "pass"),
    "a function of Python's, asserted": ("assert sorted([3, 1]) == [1, 3]", "pass"),
    "what is missing in a dictionary": (
        {"inputs": [[3]], "outputs": [{"a": {"b": 1}}], "fn_name": "f"}, "def f(x):\n    return {'b': 1}"),
    "an output of None": ({"inputs": [[3]], "outputs": [[None]], "fn_name": "f"}, "def f(x):\n    pass"),
    "stdin, too large for a float": ({"inputs": ["3"], "outputs": ["1" * 400 + ".5"]}, "print('inf')"),
    "stdin, another number of that size": ({"inputs": ["3"], "outputs": ["1" * 400 + ".5"]}, f"print({'2' * 400})"),
    "answers that take long to compare": (
        "assert set(f(3)) == {1, 2}", "def f(x):\n    return [i * (2**61 - 1) for i in range(10**5)]"),
    "answers that take long to read": ("assert f(3) == 1", "def f(x):\n    return [[] for i in range(4 * 10**6)]"),
}  # fmt: skip

# Labels that a program could forge, or that none can satisfy, by their kinds; each is refused.
REFUSED = {
    "a helper that judges": "def ok(x, y):\n    return f(x) == y\nassert ok(3, 6)",
    "a helper that judges, compared": "def ok():\n    return f(3) == 6\nassert ok() == True",
    "a name without import": "assert isclose(f(3), 6.28)",
    "a module without import": "assert np.allclose(f(3), [1, 2])",
    "a module for the expected value": "assert f(3) == json.loads('[6]')",
    "an approximation": "import pytest\nassert f(3) == pytest.approx(6)",
    "an approximation without import": "assert f(3) == approx(6)",
    "a judge of the program's": "assert compare(f(3), 6)",
    "a judge of the program's, compared": "assert compare(f(3), 6) == True",
    "a judge of the program's, denied": "assert not differ(f(3), 6)",
    "a judge of the program's, by a variable": "r = f(3)\nassert compare(r, 6)",
    "a judge of the program's, in a variable": "ok = compare(f(3), 6)\nassert ok",
    "a judge of the program's, an object": "c = Checker()\nc.compare(f(3), 6)\nassert c.is_well()",
    "a statement that judges": ["assert g(0) == 0", "check(f(3), 6)"],
    "a statement that judges a variable": "r = f(3)\nassert r > 0\nassertEqual(r, 6)",
    "numpy's assertion": "import numpy as np\nassert f(0) == 0\nnp.testing.assert_allclose(f(3), [1, 2])",
    "unittest": "import unittest\nclass T(unittest.TestCase):\n    def test_a(self):\n        self.assertEqual(f(3), 6)\nassert f(0) == 0",
    "a fixture": "def test_a(x):\n    assert f(x) == x\nassert f(0) == 0",
    "a parameter with a default": "def test_a(*, x=3):\n    assert f(x) == 6\nassert f(0) == 0",
    "parameters of pytest": "import pytest\n@pytest.mark.parametrize('x', [3])\ndef test_a(x):\n    assert f(x) == 6\nassert f(0) == 0",
    "a check that nobody calls": "def check(g):\n    assert g(3) == 6\nassert f(0) == 0",
    "an else": "if __name__ != '__main__':\n    pass\nelse:\n    assert f(3) == 6\nassert f(0) == 0",
    "a call that is printed": "s = Stack()\nprint(s.pop())\nassert s.size == 0",
    "two objects": "p = Point(1, 2)\nq = Point(1, 2)\nassert p == q",
    "a sum of objects": "assert Point(1, 2) + Point(3, 4) == Point(4, 6)",
    "lists of objects": "ps = [Point(1, 2)]\nassert ps == [Point(1, 2)]",
    "one object twice": "a = Singleton()\nb = Singleton()\nassert a is b",
    "the length of an object": "s = Stack()\nassert len(s) == 0",
    "the text of an object": "p = Point(1, 2)\nassert str(p) == '1, 2'",
    "an object with `in`": "s = Stack()\nassert 2 in s",
    "an argument that stays": "a = [3, 1, 2]\nassert f(a) == [1, 2, 3] and a == [3, 1, 2]",
    "an argument that changes": "a = [3, 1, 2]\nassert f(a) is None and a == [1, 2, 3]",
    "an argument beside the answer": "a = [3, 1, 2]\nassert (f(a), a) == (None, [1, 2, 3])",
    "an iterator that goes on": "g = gen(3)\nassert next(g) == 0\nassert next(g) == 1",
    "rows that are computed in the call": "cases = {3: 6}\nassert f(cases.keys()) == 6",
    "a module that nobody has": "import solution\nassert solution.f(3) == 6",
}  # fmt: skip

NOTHING = [
    "42",
    "0.5",
    "'yes'",
    "True",
    "assert True",
    "f(3)",
    '"""doc"""',
    "import re",
    "assert math.sqrt(4) == 2",
]
NOTHING += [["x = 1", "print('x')"], "def check(g):\n    assert g(3) == 6"]

HONEST |= {
    "from main": ("from main import add\nassert add(1, 2) == 3", ADD),
    "the same call twice": (
        "s = Stack()\ns.push(1)\ns.push(2)\nassert s.pop() == 2 and s.pop() == 1", HONEST["class"][1]),
    "names of functions": (
        "x = 3\ndef test_a():\n    x = 4\n    assert f(x) == 8\ndef test_b():\n    assert f(x) == 6",
        "def f(x):\n    return 2 * x"),
    "a counter of the program's": (
        "inc()\nassert COUNT == 1", "COUNT = 0\ndef inc():\n    global COUNT\n    COUNT += 1"),
    "rows": ("cases = [{'input': [1, 2], 'output': 3}]\nfor case in cases:\n    assert add(*case['input']) == case['output']", ADD),
    "numbers of math": ("assert math.isclose(half(math.pi), 1.5707963, rel_tol=1e-6)\nassert abs(half(float('inf'))) == math.inf\n"
                        "assert half(math.inf) > 1", "def half(x):\n    return x / 2"),
    "a function of the tests'": ("def same(x, y, total):\n    assert add(x, y) == total\nsame(1, 2, 3)\nsame(2, 2, 4)", ADD),
    "a number of the tests' in a function": ("limit = 2\nassert keep(lambda x: x > limit, [1, 2, 3]) == [3]",
                                   "def keep(f, xs):\n    return [*filter(f, xs)]"),
    "statements at the end": (["assert add(1, 2) == 3", "add(3, 4)"], ADD),
    "its own module": (
        "assert area() == 2",
        "from __future__ import annotations\nimport pickle, sys\nfrom dataclasses import dataclass\n@dataclass\n"
        "class Node:\n    x: int\n    nxt: 'Node' = None\ndef area():\n    node = pickle.loads(pickle.dumps(Node(2)))\n"
        "    return sys.modules[__name__].Node(node.x).x"),
    "names of typing": ({"inputs": [[[2, 7]]], "outputs": [9], "fn_name": "total"},
                        "class Solution:\n    def total(self, xs: List[int]) -> Optional[int]:\n        return sum(xs)"),
    "functional, iterators and tuples": (
        [{"input": "3", "output": "(0, 1.0, 2)", "fn_name": "f"}], "def f(n):\n    return (i for i in range(n))"),
    "stdin, by its name": (SUMS, "print(sum(map(int, open('/dev/stdin').read().split())), file=open('/dev/stdout', 'w'))"),
}  # fmt: skip
