"""The start of a head's values: made anew, or brought to a head that was built where nothing has any."""

from typing import Any

import torch
from torch import Tensor, nn

from hyperproto.codebook import Codebook
from hyperproto.errors import AssignmentError
from hyperproto.projection import LOADED
from hyperproto.separation import default_logit_scale


class Restartable(Codebook):
    """A codebook behind a projection, both of which can start anew.

    Loaders that fill a model without calling `load_state_dict`, as transformers does, leave what they have not loaded
    as memory that nothing was written to. They are followed by the mark that they set when they are done.

    Attributes:
        projection: what its subclass makes; nothing here asks which.
    """

    projection: nn.Module

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Assignment and scale as at the start; the layers of the projection have a `reset_parameters` of their own."""
        if not self._entries()[0].is_meta:
            self._write(torch.arange(self.num_classes, device="cpu"), 1)
        self.logit_scale.fill_(self.initial_logit_scale)

    @torch.no_grad()
    def reset_(self) -> None:
        """Everything as at the start, in place: prototypes, assignment, scale and projection.

        For models that are built without values and filled by something that never calls `load_state_dict`, as
        transformers does: for `_init_weights` of a class that converts itself when it is made. What transformers has
        marked as loaded stays as it was loaded. A class without such a line is served too: see `__setattr__`.

        Raises:
            AssignmentError: the head is on the device "meta": there is nothing to write to.
            BankError: prototypes that were given, and not built, have been lost.

        Examples:
            >>> from hyperproto import HypersphericalHead
            >>> head = HypersphericalHead(8, 4, dim=3).to("meta").to_empty(device="cpu")
            >>> head.reset_()
            >>> torch.equal(head.bank.prototypes, HypersphericalHead(8, 4, dim=3).bank.prototypes)
            True
        """
        if self._entries()[0].is_meta:
            raise AssignmentError('the head is on the device "meta". Call model.to_empty(device=...) first.')
        loaded = self._take_loaded() if self._awaits_values else {}
        if "bank.prototypes" not in loaded:  # else it may take long to build what is replaced at once
            self.bank.reset_parameters()
        if self._scale_of_bank:
            self.initial_logit_scale = default_logit_scale(self.bank.prototypes, self.num_classes)
        for layer in self.projection.modules():
            if callable(reset := getattr(layer, "reset_parameters", None)):
                reset()
        self.reset_parameters()
        self.load_state_dict(loaded, strict=False)

    def _take_loaded(self) -> dict[str, Tensor]:
        """Copies of the entries that transformers has marked as loaded; the marks are off then."""
        loaded = {}
        for name, value in (*self.named_parameters(), *self.named_buffers()):
            if getattr(value, LOADED, False):
                loaded[name] = value.detach().clone()
                delattr(value, LOADED)
        return loaded

    def __setattr__(self, name: str, value: Any) -> None:
        # transformers' word for being done with a module: what it has not loaded is memory that nothing was written to.
        if name == LOADED and value and self._awaits_values and not self._entries()[0].is_meta:
            self.reset_()
        super().__setattr__(name, value)
