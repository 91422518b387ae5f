"""Containers with the layout of foreign ones, written without foreign code: modules of their names stand in meanwhile."""

import contextlib
import math
import sys
import types
from collections import OrderedDict

import torch

# the real loader of these files runs this text; ours must not
HOSTILE = "import pathlib; pathlib.Path('ran').touch()\n"


@contextlib.contextmanager
def modules(**names):
    """Stands modules in: modules(a__b={"C": C}) makes a.b.C importable, and makes C say that it lives there."""
    before, made = dict(sys.modules), []
    try:
        for dotted, content in names.items():
            path = dotted.split("__")
            for i in range(len(path)):
                name = ".".join(path[: i + 1])
                if name not in made:
                    sys.modules[name] = types.ModuleType(name)
                    made.append(name)
            for name, thing in content.items():
                setattr(sys.modules[".".join(path)], name, thing)
                thing.__module__, thing.__qualname__, thing.__name__ = ".".join(path), name, name
        yield
    finally:
        for name in made:
            if name in before:
                sys.modules[name] = before[name]
            else:
                del sys.modules[name]


def wave(shape, k):
    """Numbers without a generator, so that other programs make the same: 0.6 sin(0.7 i + k)."""
    count = math.prod(shape)
    return (torch.sin(0.7 * torch.arange(count, dtype=torch.float64) + k) * 0.6).float().reshape(shape)


class EasyDict(dict):
    pass


def _reconstruct_persistent_obj(meta):
    raise AssertionError("the file's own loader was called")


class Persistent:
    """An object that pickles as NVIDIA's persistence writes one, with source code that must never run."""

    def __init__(self, class_name, state, version=6):
        self.meta = {"type": "class", "version": version, "module_src": HOSTILE, "class_name": class_name, "state": state}

    def __reduce__(self):
        return _reconstruct_persistent_obj, (self.meta,)


NVIDIA = {
    "torch_utils__persistence": {"_reconstruct_persistent_obj": _reconstruct_persistent_obj},
    "dnnlib__util": {"EasyDict": EasyDict},
}


def module_record(state, class_name="Generator", init_kwargs=None, attributes=None, hidden=()):
    """A network's record, layer in layer, from a flat state dict; `attributes` are those of every layer by its path."""
    attributes = attributes or {}

    def level(prefix, names):
        parameters, buffers, children = OrderedDict(), OrderedDict(), OrderedDict()
        for key in names:
            head, _, rest = key.partition(".")
            if rest:
                children.setdefault(head, []).append(rest)
            elif isinstance(tensor := state[prefix + key], torch.nn.Parameter):
                parameters[head] = tensor
            else:
                buffers[head] = tensor
        layers = OrderedDict((name, level(f"{prefix}{name}.", rest)) for name, rest in children.items())
        content = {"training": False, "_parameters": parameters, "_buffers": buffers, "_modules": layers}
        content |= {"_non_persistent_buffers_set": set(hidden), "_init_args": (), "_init_kwargs": EasyDict()}
        content |= attributes.get(prefix[:-1], {})
        if not prefix:
            content["_init_kwargs"] = EasyDict(init_kwargs or {})
        return Persistent(class_name if not prefix else "Layer", content)

    return level("", list(state))
