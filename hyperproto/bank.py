"""The bank: fixed unit prototypes, where they come from and how good they are."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hyperproto.arguments import flag, matrix, readable, seed_number, whole_number
from hyperproto.checkpoint import is_same_memory, loading_under_way
from hyperproto.constructions import CONSTRUCTIONS, choose_method
from hyperproto.constructions.class_vectors import class_vector_points
from hyperproto.errors import BankError
from hyperproto.precision import keeping_dtype
from hyperproto.prototypes import check_kind, check_same_prototypes, check_unit_rows, equal_rows, has_values
from hyperproto.separation import BankReport, report_separation
from hyperproto.sphere import normalise
from hyperproto.telling import tell

#: Rows that a move between devices compares at a time.
COMPARED_AT_ONCE = 65_536


class PrototypeBank(nn.Module):
    r"""P fixed unit prototypes in dimension D: a buffer that no optimiser ever sees.

    The same arguments give the same bank, bit for bit, on machines of one kind; the global random state is neither
    read nor changed. Whatever `half()` or `double()` do to a model around it, the prototypes stay in float32. After
    `to_empty` they are NaN until a checkpoint is loaded or `reset_parameters` builds them anew.

    Args:
        num_prototypes: P >= 2, the number of classes or more.
        dim: D >= 2.
        method: "simplex" (P <= D + 1, optimal), "orthoplex" (D + 1 < P <= 2D, optimal), "separated" (smallest largest
            cosine), "uniform" (smallest Gaussian potential), "energy" (smallest Riesz energy), "hpn" (smallest mean of
            row maxima), "code" (binary codes, for thousands to millions), "random", or "auto": the first of simplex,
            orthoplex and separated that serves P and D; beyond what can be optimised in minutes a code, or random
            prototypes where no code has enough words.
        seed: of the random rotation or the random start.
        power: for "energy" only: the exponent s, one of 0, 1 and 2.
        half_space: for "energy" only: spread the prototypes as lines, {w, -w}.

    Raises:
        BankError: a method that does not exist or cannot place P prototypes in dimension D, or options of another
            method.

    Examples:
        >>> bank = PrototypeBank(100, 50)
        >>> bank.prototypes.shape, bank.method
        (torch.Size([100, 50]), 'orthoplex')
        >>> abs(bank.report().max_cosine) < 1e-6
        True

    References:
        Saadabadi et al., CVPR 2024, section 3.2; each construction names its own.
    """

    # Annotations are objects in this file (no `from __future__ import annotations`): TorchScript reads them.
    prototypes: Tensor
    method: str
    #: Whether a head has it; the next one takes a copy, so that models made with one bank move independently.
    in_use: bool = False

    def __init__(
        self,
        num_prototypes: int,
        dim: int,
        *,
        method: str = "auto",
        seed: int = 0,
        power: int = 2,
        half_space: bool = False,
    ) -> None:
        super().__init__()
        num_prototypes = whole_number(num_prototypes, "num_prototypes", error=BankError)
        dim = whole_number(dim, "dim", error=BankError)
        seed = seed_number(seed)
        if isinstance(method, str) and method == "auto":
            method = choose_method(num_prototypes, dim)
        if not isinstance(method, str) or method not in CONSTRUCTIONS:
            known = ", ".join(repr(name) for name in ("auto", *CONSTRUCTIONS))
            raise BankError(
                f"expected a method among {known}, got {method!r}. For prototypes of your own use "
                "PrototypeBank.from_tensor(prototypes)."
            )
        power = whole_number(power, "power", largest=2, error=BankError)
        half_space = flag(half_space, "half_space")
        _check_energy_options(method, power, half_space)
        self.method = method
        self._options = {"power": power, "half_space": half_space} if method == "energy" else {}
        self._seed: int | None = seed
        self.register_buffer("prototypes", self._build(num_prototypes, dim))
        self._kept: Tensor | None = None

    @classmethod
    def from_tensor(cls, prototypes: Tensor) -> "PrototypeBank":
        """A bank of rows given: normalised copies, on the same device; `method` is "given".

        Args:
            prototypes: (P, D) floating point, or an array or list, P >= 2, D >= 2, finite, no zero row.

        Raises:
            ShapeError: not a floating matrix of at least two rows and two columns.
            BankError: rows that have no direction; the message names the first few.

        Examples:
            >>> PrototypeBank.from_tensor(torch.tensor([[2.0, 0.0], [0.0, -3.0]])).prototypes
            tensor([[ 1.,  0.],
                    [ 0., -1.]])
        """
        prototypes = matrix(prototypes, "prototypes of shape (P, D), P >= 2 and D >= 2", smallest=(2, 2))
        prototypes = readable(prototypes, "prototypes")
        unit_rows = normalise(prototypes.detach())
        # NaN compares false, so that rows of NaN or infinity are caught with the zero rows.
        pointless = torch.nonzero(~(unit_rows.norm(dim=1) > 0.5)).flatten().tolist()
        if pointless:
            raise BankError(
                f"expected finite, non-zero prototypes, got {len(pointless)} rows without a direction, "
                f"the first at {pointless[:5]}. Drop or replace them."
            )
        equal = equal_rows(unit_rows)
        if equal:
            tell(
                f"{len(equal)} prototypes of {len(unit_rows)} equal others, the first pairs being rows {equal[:5]}: "
                "labels on two equal prototypes have equal logits for every input. Drop or move one of each pair."
            )
        return cls._holding(unit_rows, "given")

    @classmethod
    def from_class_vectors(cls, vectors: Tensor, dim: int) -> "PrototypeBank":
        r"""A bank of class vectors, spread as evenly over D dimensions as these allow; `method` is "class vectors".

        Vectors may be the weights of a trained classifier, word or text embeddings of the class names, or attributes.
        Row i is the prototype of class i: the first assignment of a head, label i to row i, is the right one. Where
        the vectors, less their mean, have C - 1 independent directions and D >= C - 1, the bank is the regular simplex,
        and they play no further part; else prototypes that have to share directions are those whose vectors do.

        A trained classifier moves onto this bank by `convert_model(..., warm_start=True)`, and ranks classes about as
        its D leading directions did. In very few dimensions, C > D (D + 1) / 2, similar classes come close together;
        `report()` tells how close.

        Args:
            vectors: (C, E) floating point, or an array or list, finite, C >= 2; their mean and their common length do
                not count.
            dim: D >= 2, whatever E is.

        Raises:
            ShapeError: not a floating matrix of at least two rows.
            BankError: vectors that are not finite, equal to the mean of all, without a part in the D leading
                directions, or equal in these.

        Examples:
            >>> classifier = nn.Linear(64, 100)
            >>> bank = PrototypeBank.from_class_vectors(classifier.weight, dim=50)
            >>> bank.prototypes.shape, bank.method
            (torch.Size([100, 50]), 'class vectors')

        References:
            The prior: Mettes et al., NeurIPS 2019, section 3.2 (privileged information).
        """
        dim = whole_number(dim, "dim", error=BankError)
        vectors = matrix(vectors, "class vectors of shape (C, E), C >= 2", smallest=(2, 1))
        vectors = readable(vectors, "class vectors").detach().cpu().double()
        # NaN and infinity make the largest offset NaN, which compares false.
        offsets = (vectors - vectors.mean(dim=0)).norm(dim=1)
        pointless = torch.nonzero(~(offsets > 1e-6 * offsets.max())).flatten().tolist()
        if pointless:
            raise BankError(
                f"expected finite class vectors that differ from their mean, got {len(pointless)} others, the first at "
                f"{pointless[:5]}. Give those classes vectors of their own."
            )
        return cls._holding(class_vector_points(vectors, dim), "class vectors")

    @classmethod
    def from_checkpoint(cls, state_dict: Mapping[str, Tensor], name: str) -> "PrototypeBank":
        """A bank of the prototypes that a `state_dict` holds under a name, bit for bit; `method` is "loaded".

        Nothing is constructed, whatever made them. They are copied.

        Raises:
            BankError: what is there are no prototypes: no unit rows in float32.

        Examples:
            >>> bank = PrototypeBank(4, 3)
            >>> loaded = PrototypeBank.from_checkpoint(bank.state_dict(), "prototypes")
            >>> torch.equal(loaded.prototypes, bank.prototypes), loaded.method
            (True, 'loaded')
        """
        got = state_dict[name].detach()
        check_kind(torch.empty(got.shape, device="meta"), got, name)
        check_unit_rows(got, name)
        return cls._holding(got.clone(memory_format=torch.contiguous_format), "loaded")

    @classmethod
    def _holding(cls, prototypes: Tensor, method: str) -> "PrototypeBank":
        bank = cls.__new__(cls)
        nn.Module.__init__(bank)
        bank.register_buffer("prototypes", prototypes)
        bank.method = method
        bank._seed = None
        bank._options = {}
        bank._kept = None
        return bank

    @property
    def num_prototypes(self) -> int:
        """P."""
        return self.prototypes.shape[0]

    @property
    def dim(self) -> int:
        """D."""
        return self.prototypes.shape[1]

    @torch.no_grad()
    def report(self) -> BankReport:
        """How well the prototypes are separated, beside a lower bound on what is possible.

        Takes O(P D) memory, and O(P^2 D) time up to 50,000 prototypes; beyond, a code's cosine is known from its
        weight distribution, and other banks are sampled. `source` says which.

        Examples:
            >>> print(PrototypeBank(4, 3).report())
            largest cosine -0.3333 (nearest pair 109.5 degrees apart), lower bound -0.3333 (rankin), gap 0.0000;
            mean over rows -0.3333; length of the mean 0.0000 (from all pairs)

        Raises:
            BankError: the prototypes have no values (device meta, or `to_empty` and no checkpoint since).
        """
        if not has_values(self.prototypes):
            raise BankError("the bank has no values to report on. Load a checkpoint first.")
        return report_separation(self.prototypes, self.method)

    def extra_repr(self) -> str:
        """What `print` shows of the bank."""
        return f"num_prototypes={self.num_prototypes}, dim={self.dim}, method={self.method!r}"

    def forward(self) -> Tensor:
        """(P, D), the prototypes. A call, so that hooks on modules (offloading) bring the buffer to where it is."""
        return self.prototypes

    def keep_values(self) -> None:
        """Remember the prototypes for `reset_parameters`, until a checkpoint brings some.

        For models made on the default device "meta", whose buffers something is going to replace.
        """
        self._kept = self.prototypes

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Prototypes as they were built, in place, where they have been lost; else nothing: they never move.

        Raises:
            BankError: they were given, and not built.
        """
        if self.prototypes.is_meta:
            return
        if self._kept is not None:
            self.prototypes.copy_(self._kept)
            self._kept = None
        elif not has_values(self.prototypes):
            if self._seed is None:
                raise BankError(
                    f"the prototypes ({self.method}) were lost when the bank was emptied, and cannot be built anew. "
                    "Load a checkpoint that has them, or convert the model with this bank when its weights are loaded."
                )
            self.prototypes.copy_(self._build(self.num_prototypes, self.dim))

    def _build(self, num_prototypes: int, dim: int) -> Tensor:
        generator = torch.Generator(device="cpu").manual_seed(self._seed or 0)
        return CONSTRUCTIONS[self.method](num_prototypes, dim, generator, **self._options)

    def check_checkpoint(self, state_dict: Mapping[str, Any], prefix: str, *, alone: bool = False) -> None:
        """Raise unless what a `state_dict` holds for this bank under a prefix are prototypes of its shape.

        Args:
            state_dict: of the bank, or of what holds it.
            prefix: of the bank's keys.
            alone: whether they come without the assignment that belongs to them: then only the bank's own will do.

        Raises:
            BankError: another shape or dtype, rows that are no prototypes, or others than the bank's where these are
                alone.
        """
        name = prefix + "prototypes"
        if name in state_dict:
            got = state_dict[name]
            check_kind(self.prototypes, got, name)
            check_unit_rows(got, name)
            if alone:
                check_same_prototypes(self.prototypes, got, name)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        # Once, by the first of its names, where several heads share it: safetensors takes no tensor twice.
        if not any(isinstance(each, Tensor) and is_same_memory(each, self.prototypes) for each in destination.values()):
            super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        name = prefix + "prototypes"
        if name not in state_dict:
            state_dict.update((name, value) for value in _by_another_name(self))
        self.check_checkpoint(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._kept = None if name in state_dict else self._kept

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PrototypeBank":
        before = self.prototypes
        super()._apply(keeping_dtype(fn), recurse)  # type: ignore[no-untyped-call]
        # Freed memory may hold an older bank, so that nothing later could tell prototypes from what `to_empty` found.
        if _values_lost(before, self.prototypes):
            self.prototypes.fill_(math.nan)
        return self


def _by_another_name(bank: PrototypeBank) -> list[Tensor]:
    """Prototypes that the checkpoint under way holds for a bank under another of its names; one, or none."""
    root, whole = loading_under_way() or (bank, {})
    names = [name for name, each in root.named_modules(remove_duplicate=False) if each is bank]
    return [whole[f"{name}.prototypes"] for name in names if f"{name}.prototypes" in whole][:1]


def _values_lost(before: Tensor, after: Tensor) -> bool:
    """Whether a buffer that `_apply` has replaced holds other values than before; False where it holds none at all."""
    if after is before or after.is_meta or type(after) is not Tensor:
        return False
    pairs = zip(torch.split(before, COMPARED_AT_ONCE), torch.split(after, COMPARED_AT_ONCE), strict=True)
    return before.is_meta or not all(torch.equal(old.to(new.device), new) for old, new in pairs)


def _check_energy_options(method: str, power: int, half_space: bool) -> None:
    if method != "energy" and (power != 2 or half_space):
        raise BankError(
            f'power and half_space are options of method="energy", got power={power} and half_space={half_space} '
            f"with method={method!r}. Drop them or change the method."
        )
