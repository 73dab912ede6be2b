"""All batches walk through a model together: each stops at every layer, the layer is worked on, and all go on.

Algorithms that round one layer after another want each layer's inputs as the layers before it, rounded already, make
them. Running the model anew for every layer takes as many runs as there are layers; running block by block takes a
guess at what a model does between its blocks. Here each batch is one forward in a thread of its own, held at the door
of a layer until all batches have come there. So there is one forward in all, whatever the model does in between, and
what is held in memory is what a forward holds at one point, once for each batch. Only one thread runs at any time.

A second model can walk beside: the float one, say, so that at each layer there is what it is called with, and what it
would have been called with had nothing been rounded.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from qat.errors import CalibrationError, QuantizationError
from qat.tracing import Arguments, call, evaluating, uncompiled


@dataclass
class Arrival(Arguments):
    """One batch in front of a module, with what the module is called with.

    Attributes:
        batch: number of the batch.
        beside: the same batch in front of the same module of the model that walks beside; None: there is none, or it
            took another way.
    """

    batch: int
    beside: Arrival | None = None


class _Abandoned(BaseException):
    """Unwinds a forward that nobody wants to finish; not an Exception, so that no forward catches it."""


class _Forward:
    """One batch on its way: a thread that runs only while :meth:`advance` waits for it."""

    def __init__(self, number: int, model: nn.Module, batch: Any) -> None:
        self.number, self.model, self.batch = number, model, batch
        self.at: str | None = None
        self.arrival: Arrival | None = None
        self.error: BaseException | None = None
        self.done = self.abandoned = False
        self._go, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self.thread = threading.Thread(target=self._run, name=f"batch {number}", daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            self._go.acquire()
            if not self.abandoned:
                with torch.no_grad():
                    call(self.model, self.batch)
        except _Abandoned:
            pass
        except BaseException as error:
            self.error = error
        finally:
            self.done, self.at, self.arrival = True, None, None
            self._back.release()

    def stop(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Called in the thread: wait here until :meth:`advance`."""
        self.at, self.arrival = name, Arrival(args, kwargs, self.number)
        self._back.release()
        self._go.acquire()
        self.at = self.arrival = None
        if self.abandoned:
            raise _Abandoned

    def advance(self) -> None:
        """Run to the next stop, or to the end."""
        self._go.release()
        self._back.acquire()

    def abandon(self) -> None:
        if not self.done:
            self.abandoned = True
            self.advance()
        self.thread.join()


def walk(model: nn.Module, batches: Sequence[Any], stops: Mapping[str, nn.Module],
         work: Callable[[str, list[Arrival]], None], beside: nn.Module | None = None) -> list[str]:
    """Run ``model`` on all batches at once, in eval, without gradients, and call ``work`` at each stop.

    ``work(name, arrivals)`` may change the module: the batches that wait there run it afterwards as it is then, and so
    do those that come later or again. Where batches take different ways (experts that some of them skip), the earliest
    stop in the order of ``stops`` that anybody waits at comes first.

    Args:
        batches: inputs as for :func:`~qat.calibrate`.
        stops: name -> module; none of them inside another one.
        beside: a model with modules of the same names, that the batches walk through at the same time.

    Returns:
        The names of the stops that no batch came to.

    Raises:
        CalibrationError: no batch; or what ``work`` raises, as it is. An error in a forward names its batch.
    """
    if not batches:
        raise CalibrationError("calibration needs at least one batch")
    order = {name: place for place, name in enumerate(stops)}
    worked: set[str] = set()
    current: dict[int, _Forward] = {}

    def door(name: str) -> Callable[..., None]:
        def arrive(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            forward = current.get(threading.get_ident())
            if name not in worked and forward is not None:
                forward.stop(name, args, kwargs)
        return arrive

    def started(walker: nn.Module) -> list[_Forward]:
        return [_Forward(number, walker, batch) for number, batch in enumerate(batches)]

    with ExitStack() as stack:
        for walker in (model,) if beside is None else (model, beside):
            stack.enter_context(evaluating(walker))
            for name, module in (stops if walker is model else _twins(walker, stops)).items():
                handle = module.register_forward_pre_hook(door(name), with_kwargs=True, prepend=True)
                stack.callback(handle.remove)
        stack.enter_context(uncompiled())
        forwards = started(model)
        companions = [] if beside is None else started(beside)
        for forward in (*forwards, *companions):
            stack.callback(forward.abandon)
        current.update({f.thread.ident: f for f in (*forwards, *companions) if f.thread.ident is not None})
        moving = [*forwards, *companions]
        while True:
            for forward in moving:
                forward.advance()
                if forward.error is not None:
                    raise _named(forward)
            waiting = [f for f in forwards if f.at is not None]
            if not waiting:
                return [name for name in stops if name not in worked]
            name = min((f.at for f in waiting if f.at is not None), key=order.__getitem__)
            behind = [f for f in companions if f.at is not None and order[f.at] < order[name]]
            if behind:                              # they wait where nobody else will come
                moving = list(behind)
                continue
            waiting = [f for f in waiting if f.at == name]
            joined = {f.number: f for f in companions if f.at == name}
            work(name, [replace(f.arrival, beside=joined[f.number].arrival if f.number in joined else None)
                        for f in waiting if f.arrival is not None])
            worked.add(name)
            moving = [*waiting, *joined.values()]


def _twins(model: nn.Module, stops: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """The modules of ``model`` that have the names of ``stops``."""
    return {name: model.get_submodule(name) for name in stops}


def _named(forward: _Forward) -> BaseException:
    """The error of a forward; ours say which batch it was, others stay what they are."""
    error = forward.error
    assert error is not None
    if isinstance(error, QuantizationError):
        named = type(error)(f"batch {forward.number}: {error}")
        named.__cause__ = error
        return named
    return error
