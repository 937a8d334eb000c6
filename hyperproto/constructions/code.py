r"""Prototypes for very many classes: the sign vectors of binary codes, no optimisation.

Two words of length n that differ in d places are, as sign vectors, at cosine 1 - 2 d / n. Few words are far apart in
the best codes known, thousands to millions of them at a largest cosine of a few $1 / \sqrt{n}$:

================= ============ ======================= ===================================
code              n            words                   largest cosine
================= ============ ======================= ===================================
Kerdock           2^m, m even  n^2                     1 / sqrt(n)
dual BCH, t = 2   2^m          2 n^2                   sqrt(2 / n), 2 / sqrt(n) for even m
dual BCH, t = 3   2^m          2 n^3                   sqrt(8 / n), 4 / sqrt(n) for even m
================= ============ ======================= ===================================

Each is linear over the integers modulo q: a word is a message times a generator matrix, with q = 2 for BCH and q = 4
for Kerdock, whose letters then become pairs of signs (Gray map). Any dimension is served: the next longer code loses
places (shortened), or a shorter one gets new ones (padded), whichever gives the smaller cosine.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from hyperproto.constructions._check import check_size
from hyperproto.constructions._rotation import random_frame
from hyperproto.errors import BankError
from hyperproto.precision import full_precision

#: Words made at a time.
CHUNK_ROWS = 16_384

#: A primitive polynomial over GF(2) of each degree m: bit i is the coefficient of x^i.
PRIMITIVE_POLYNOMIALS = {
    3: 0b1011,
    4: 0b10011,
    5: 0b100101,
    6: 0b1000011,
    7: 0b10001001,
    8: 0b100011101,
    9: 0b1000010001,
    10: 0b10000001001,
    11: 0b100000000101,
    12: 0b1000001010011,
    13: 0b10000000011011,
}


@dataclass(frozen=True)
class SignCode:
    """A code, and how it is fitted to a dimension.

    Attributes:
        family: "kerdock" or "bch".
        log_length: m; words have n = 2^m signs.
        order: t of the BCH code; 1 for Kerdock.
        dim: D, the dimension served.
    """

    family: str
    log_length: int
    order: int
    dim: int

    @property
    def length(self) -> int:
        """Number of signs n of a word."""
        return 1 << self.log_length

    @property
    def num_digits(self) -> int:
        """Digits of a message."""
        return self.log_length if self.family == "kerdock" else self.order * self.log_length + 1

    @property
    def modulus(self) -> int:
        """q, the number of values of a digit."""
        return 4 if self.family == "kerdock" else 2

    @property
    def num_words(self) -> int:
        """One for each message."""
        return self.modulus**self.num_digits

    @property
    def largest_cosine(self) -> float:
        """Between two rows at this dimension; an upper bound if the code is shortened, attained otherwise."""
        odd = self.log_length % 2
        # The largest sum of a word's signs, apart from the constant words, from the weight distribution.
        log_sum = 0.5 * self.log_length if self.family == "kerdock" else 0.5 * (self.log_length - odd) + self.order - 1
        if odd and self.family == "bch":
            log_sum = 0.5 * (self.log_length + 2 * self.order - 3)
        lost = max(self.length - self.dim, 0)
        return (2.0**log_sum + lost) / (self.length - lost)


def code_points(num_prototypes: int, dim: int, generator: torch.Generator) -> Tensor:
    r"""Distinct words of the best code that is large enough, as unit vectors, randomly rotated.

    $$ w_i = \tfrac{1}{\sqrt{n}} \, (-1)^{u_i G} \, R $$

    The messages u are spread over all of them by a random affine map; the rotation R leaves no direction special.
    Time O(P D^2), memory O(P D).

    Args:
        num_prototypes: P >= 2.
        dim: D; codes begin at D = 21.
        generator: of the messages and the rotation.

    Returns:
        (P, D) float32 unit rows.

    Raises:
        BankError: more prototypes than the largest code in this dimension has words.

    Examples:
        >>> points = code_points(3000, 64, torch.Generator().manual_seed(0))
        >>> cosines = (points @ points.T).fill_diagonal_(-1)
        >>> round(float(cosines.max()), 4)  # a Kerdock code: 1 / sqrt(64)
        0.125

    References:
        Kerdock 1972; Hammons, Kumar, Calderbank, Sloane, Solé, The Z4-linearity of Kerdock, Preparata, Goethals, and
        related codes, 1994; MacWilliams and Sloane, The Theory of Error-Correcting Codes, chapter 9 (dual BCH);
        Lindström et al., arXiv 2407.07664 (prototypes from linear codes).
    """
    code = choose_code(num_prototypes, dim)
    kept = min(code.length, dim)
    places = torch.randperm(code.length, generator=generator, device="cpu")[:kept]
    rotation = (random_frame(dim, kept, generator).T / kept**0.5).float()  # (kept, D)
    points = torch.empty(num_prototypes, dim, dtype=torch.float32, device="cpu")
    chunks = torch.split(points, CHUNK_ROWS)
    with full_precision(points.device):
        for rows, signs in zip(chunks, _words(code, num_prototypes, generator), strict=True):
            torch.mm(signs[:, places], rotation, out=rows)
    return points


def choose_code(num_prototypes: int, dim: int) -> SignCode:
    """The code with the smallest largest cosine among those with enough words.

    Raises:
        BankError: there is none.

    Examples:
        >>> choose_code(60_000, 256).family, choose_code(100_000, 512).order, choose_code(1_000_000, 512).order
        ('kerdock', 2, 3)
    """
    check_size(num_prototypes, dim)
    candidates = [code for code in _codes_near(dim) if code.num_words >= num_prototypes]
    if not candidates:
        largest = max((code.num_words for code in _codes_near(dim)), default=0)
        raise BankError(
            f"codes in dimension {dim} have {largest} words at most (those of few dimensions have none), got "
            f'num_prototypes={num_prototypes}. Use a larger dim, or method="random".'
        )
    return min(candidates, key=lambda code: (code.largest_cosine, code.num_words))


def has_code(num_prototypes: int, dim: int) -> bool:
    """Whether a code serves this many prototypes in this dimension.

    Examples:
        >>> has_code(100_000, 512), has_code(100_000, 16)
        (True, False)
    """
    return any(code.num_words >= num_prototypes for code in _codes_near(dim))


def _codes_near(dim: int) -> Iterator[SignCode]:
    """Codes of at most twice and at least half this length."""
    below = dim.bit_length() - 1
    for log_length in (below, below + 1):
        if log_length not in PRIMITIVE_POLYNOMIALS or log_length < 5:
            continue  # below length 32 the powers that make the BCH codes fall together
        kerdock = [SignCode("kerdock", log_length, 1, dim)] if log_length % 2 == 0 else []
        for code in (*kerdock, SignCode("bch", log_length, 2, dim), SignCode("bch", log_length, 3, dim)):
            if code.largest_cosine < 1.0:  # else so many places are lost that words may fall together
                yield code


def _words(code: SignCode, num_words: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Chunks (rows, n) of distinct words as signs, in float32."""
    matrix = _kerdock_generator(code) if code.family == "kerdock" else _bch_generator(code)
    # Odd factors make x -> a x + b one-to-one modulo a power of two.
    a, b = (2 * int(torch.randint(code.num_words // 2, (), generator=generator, device="cpu")) + k for k in (1, 0))
    digit_values = code.modulus ** torch.arange(code.num_digits, device="cpu")
    for numbers in torch.split(torch.arange(num_words, device="cpu"), CHUNK_ROWS):
        messages = (a * numbers + b) % code.num_words
        digits = (messages[:, None] // digit_values) % code.modulus  # (rows, digits)
        letters = (digits.float() @ matrix).remainder_(code.modulus)
        yield _gray_signs(letters) if code.modulus == 4 else 1.0 - 2.0 * letters


def _gray_signs(letters: Tensor) -> Tensor:
    """Letters 0, 1, 2, 3 -> the pairs ++, -+, --, +-: neighbours differ in one sign; (rows, n / 2) -> (rows, n)."""
    first = 1.0 - 2.0 * ((letters == 1) | (letters == 2)).float()
    second = 1.0 - 2.0 * (letters >= 2).float()
    return torch.cat([first, second], dim=1)


def _bch_generator(code: SignCode) -> Tensor:
    """Generator matrix of the dual of the extended BCH code: ones, and the bits of x, x^3, ..., x^(2t-1) for all x.

    Rows are functions on the field of 2^m elements x; a word is a sum of the traces of a x, b x^3, ... and a constant.
    """
    m, length = code.log_length, code.length
    polynomial = PRIMITIVE_POLYNOMIALS[m]
    powers = [1]  # of the primitive element, as bit patterns
    for _ in range(length - 2):
        doubled = powers[-1] << 1
        powers.append(doubled ^ polynomial if doubled >= length else doubled)
    table = torch.tensor(powers, device="cpu")
    exponents = torch.arange(length - 1, device="cpu")
    rows = [torch.ones(1, length, dtype=torch.int64, device="cpu")]
    for odd in range(1, 2 * code.order, 2):
        values = torch.cat([torch.zeros(1, dtype=torch.int64, device="cpu"), table[odd * exponents % (length - 1)]])
        rows.append((values >> torch.arange(m, device="cpu")[:, None]) & 1)  # (m, n)
    return torch.cat(rows).float()


def _kerdock_generator(code: SignCode) -> Tensor:
    """Generator matrix of the quaternary Kerdock code: ones, and the coordinates of 0, 1, xi, xi^2, ... in GR(4, m-1).

    xi is a root of the polynomial over the integers modulo 4 whose roots are those of the binary one, lifted.
    """
    degree = code.log_length - 1
    feedback = _lift_to_modulus_4(PRIMITIVE_POLYNOMIALS[degree], degree)[:-1]  # of the monic polynomial
    power = [1] + [0] * (degree - 1)
    columns = [[0] * degree]
    for _ in range((1 << degree) - 1):
        columns.append(power)
        carry = power[-1]
        power = [(low - carry * tap) % 4 for low, tap in zip([0, *power[:-1]], feedback, strict=True)]
    coordinates = torch.tensor(columns, device="cpu").T
    return torch.cat([torch.ones_like(coordinates[:1]), coordinates]).float()


def _lift_to_modulus_4(polynomial: int, degree: int) -> list[int]:
    """Coefficients modulo 4, constant first, of the lift: h(x^2) = +-(e(x)^2 - o(x)^2), e and o the even and odd parts.

    References:
        Graeffe's method; Hammons et al. 1994, section III.
    """
    bits = [(polynomial >> i) & 1 for i in range(degree + 1)]
    squares = [0] * (2 * degree + 1)
    for i, first in enumerate(bits):
        for j, second in enumerate(bits):
            if (i - j) % 2 == 0:  # even times even, minus odd times odd
                squares[i + j] += first * second * (1 if i % 2 == 0 else -1)
    lifted = squares[::2]
    return [coefficient * lifted[-1] % 4 for coefficient in lifted]
