"""Python source of the CPU kernels that solve, specialised to a stencil: every offset is a literal in straight-line code.

``generated_solve.md``, beside this package, shows the kernel of a small stencil; `cpu_loops` has the solve for stencils of many
offsets.

A row is solved in two parts. The *gather* subtracts, in vectors, what other rows contribute to the right-hand side, and divides
what is left and the row's own coefficients by the diagonal. The *recursion* then walks along the row, site by site; its pace is
the latency of one multiply-add, which several images in step hide. A row in which a quotient leaves the dtype's normal range is
walked *again*, with a division a site.
"""

from collections.abc import Sequence

from .cpu_source import diagonal_value, element_bytes, inside, kernel_source, load
from .cpu_unrolled import Terms
from .simd import lanes
from .simd_normals import block_size, draw_block, store_block
from .stencils import Offsets

# Distances along the row whose solved values the recursion keeps in registers; farther ones are read back from memory.
_REGISTERS = 4

# Planes of a solve's scratch beside those of the own row's coefficients.
_SCRATCH_PLANES = 3


def solve(
    offsets: Offsets,
    dtype: str,
    transpose: bool,
    cache: bool,
    log: bool,
    chains: int,
    shared: bool = False,
    normal: bool = False,
) -> str:
    """x = L⁻¹b or L⁻ᵀb over images, ``chains`` of them in step; ``diag`` is the log-diagonal where ``log``.

    Where ``shared``, those in step are samples of one factor, and each coefficient is loaded and divided once for all of them.
    The kernel's items are then so many samples.

    Where ``normal``, b are the numbers of a stream, ``rhs`` is its key, and each row is drawn just before it is solved: so they
    never leave the cache. A row must be whole blocks of the stream.
    """
    return _Solve(offsets, dtype, transpose, log, chains, shared, normal).source(cache)


def solve_scratch(offsets: Offsets, dtype: str, chains: int, width: int, normal: bool = False) -> int:
    """Elements of zeroed scratch that each thread of a solve kernel needs."""
    own = [offset[-1] for offset in offsets if not any(offset[:-1])]
    padded = -(-width // lanes(dtype)) * lanes(dtype)
    return chains * ((len(own) + _SCRATCH_PLANES) * padded + width + 2 * max(own, default=0) + width * normal)


class _Solve:
    """Writes the kernel. The variables of the image that is solved as number ``c`` in step end in that number.

    d, c, b, x      addresses of the image's diagonal, coefficients, right-hand side and result
    s               of its scratch: planes of a row of ``padded`` sites, namely the quotients of the right-hand side and of
                    each of the own row's coefficients, what is left of the right-hand side, and the diagonal
    z               of the row as far as it is solved, with margins of zeros; z_1, z_2, ... its last values, in registers
    u, first        of the row's normal numbers, and the place of the image's in the stream, where they are drawn here
    row             of the row of the result
    unsafe          mask of the lanes in which a quotient left the normal range
    """

    def __init__(self, offsets: Offsets, dtype: str, transpose: bool, log: bool, chains: int, shared: bool, normal: bool):
        self.shared, self.normal = shared, normal
        self.vector, self.coefficient = element_bytes(dtype)
        self.dtype, self.transpose, self.log, self.chains = dtype, transpose, log, range(chains)
        self.terms = Terms(offsets, dtype, transpose)
        # Terms of the own row: group, number, column.
        self.own = [(g, k, column) for g in self.terms.own_row for k, column in self.terms.groups[g][2]]
        self.others = [g for g in range(len(self.terms.groups)) if g not in self.terms.own_row]
        self.margin = max((abs(column) for _, _, column in self.own), default=0)
        self.registers = range(1, min(self.margin, _REGISTERS) + 1)
        self.planes = len(self.own) + _SCRATCH_PLANES
        self.rest, self.diagonal = f"{len(self.own) + 1} * padded + w", f"{len(self.own) + 2} * padded + w"
        # Up to a row's normal numbers, which are behind all else.
        self.solved = f"{self.planes} * padded + width + {2 * self.margin}"
        self.chain_size = f"({self.solved}{' + width' if normal else ''})"

    def source(self, cache: bool) -> str:
        step = self.terms.step
        setup = (
            "# Sites from a row's site to the same place in each row of neighbours.\n"
            + self.terms.setup()
            + "# The row's length in whole blocks, and this thread's scratch.\n"
            + f"padded = (width + {step - 1}) // {step} * {step}\n"
            + f"scratch += worker * {len(self.chains)} * {self.chain_size} * {self.vector}\n"
        )
        row = (
            ("r = rows - 1 - j\n" if self.transpose else "r = j\n")
            + "".join(self.gather(members) for members in ([self.chains] if self.shared else [[c] for c in self.chains]))
            + "# The recursion along the row.\n"
            + self.recursion(self.chains, careful=False)
            + "".join(self.again(c) for c in self.chains)
        )
        if self.shared:
            setup += f"groups = (samples + {len(self.chains) - 1}) // {len(self.chains)}\n"
        items = "item in range(start, stop)" if self.shared else f"first in range(start, stop, {len(self.chains)})"
        body = f"for {items}:\n" + inside("".join(self.image(c) for c in self.chains) + "for j in range(rows):\n" + inside(row))
        arguments = "diag, diag_b, off, off_b, off_k, rhs, rhs_s, rhs_b, x"
        operations = "simd_normals" if self.normal else "simd"
        definitions = self.terms.folds("subtract_product", self.others, len(self.chains) if self.shared else 1)
        return kernel_source(self.dtype, cache, arguments, setup, body, operations=operations, definitions=definitions)

    def image(self, c: int) -> str:
        """Addresses of an image; one too many in step solves the last image once more."""
        if self.shared:
            place = f"b = item // groups\ns = min((item - b * groups) * {len(self.chains)} + {c}, samples - 1)\n"
        else:
            place = f"item = min(first + {c}, stop - 1)\nb = item // samples\ns = item - b * samples\n"
        stream = f"u{c} = s{c} + ({self.solved}) * {self.vector}\nfirst{c} = (s * batch + b) * n\n"
        return (
            f"# Image {c + 1} of {len(self.chains)} in step: sample s of factor b.\n"
            + place
            + f"d{c} = diag + b * diag_b * {self.vector}\n"
            f"c{c} = off + b * off_b * {self.coefficient}\n"
            + ("" if self.normal else f"b{c} = rhs + (s * rhs_s + b * rhs_b) * {self.vector}\n")
            + f"x{c} = x + (s * batch + b) * n * {self.vector}\n"
            f"s{c} = scratch + {c} * {self.chain_size} * {self.vector}\n"
            f"z{c} = s{c} + ({self.planes} * padded + {self.margin}) * {self.vector}\n" + (stream if self.normal else "")
        )

    def gather(self, members: Sequence[int]) -> str:
        """The row's right-hand sides without what other rows contribute, in passes; the last one divides.

        The images have one factor. What they do not share ends in their number if there are several.
        """
        first = members[0]
        names = {c: "" if len(members) == 1 else f"_{c}" for c in members}

        def begin(number):
            def read(masked):
                code = ""
                for c, v in names.items():
                    row, index = (f"b_row{v}", "w") if number == 0 else (f"s{c}", self.rest)
                    code += f"a{v} = {load('load', row, index, masked and number == 0)}\n"
                return code

            return read

        def keep(masked):
            return "".join(f"store(s{c}, {self.rest}, a{v})\n" for c, v in names.items())

        def divide(masked):
            code = keep(masked) + f"d = {diagonal_value(masked, self.log)}\n"
            for c, v in names.items():
                code += self.quotient(f"s{c}", 0, f"a{v}", f"unsafe{c}", masked)
            for plane, term in enumerate(self.own, 1):
                unsafe = f"unsafe{first}" if len(members) == 1 else "unsafe"
                code += self.quotient(f"s{first}", plane, self.terms.coefficient(*term, masked), unsafe, masked)
            return code

        code = f"d_row = d{first} + r * width * {self.vector}\nc_row = c{first} + r * width * {self.coefficient}\n"
        for c, v in names.items():
            code += self.draw(c, v) if self.normal else f"b_row{v} = b{c} + r * width * {self.vector}\n"
            code += f"x_row{v} = x{c} + r * width * {self.vector}\nrow{c} = x_row{v}\nunsafe{c} = no_lanes()\n"
        code += "unsafe = no_lanes()\n" if len(members) > 1 else ""
        passes = self.terms.passes(self.others)
        for number, groups in enumerate(passes):
            last = number == len(passes) - 1
            code += f"# Gather, pass {number + 1} of {len(passes)}: subtract what other rows contribute"
            code += ", and divide by the diagonal.\n" if last else ".\n"
            finish, own_row = divide if last else keep, self.terms.own_row
            code += self.terms.fold(groups, begin(number), finish, own_row, list(names.values()))
        if len(members) > 1:
            code += "".join(f"unsafe{c} = either(unsafe{c}, unsafe)\n" for c in members)
        return code

    def draw(self, c: int, v: str) -> str:
        """The row's right-hand side, drawn."""
        size = block_size(self.dtype)
        block = draw_block(self.dtype, "rhs", f"(first{c} + r * width + w) // {size}") + store_block(self.dtype, f"u{c}", "w")
        return f"for w in range(0, width, {size}):\n" + inside(block) + f"b_row{v} = u{c}\n"

    def quotient(self, scratch: str, plane: int, value: str, unsafe: str, masked: bool) -> str:
        """``value / d`` into a plane of the scratch; plane 0 is the right-hand side, which may be subnormal or 0."""
        outside = "not_finite(quotient)" if plane == 0 else "not_normal(quotient, value)"
        return (
            f"value = {value}\n"
            "quotient = divide(value, d)\n"
            f"store({scratch}, {plane} * padded + w, quotient)\n"
            f"{unsafe} = either({unsafe}, {f'both({outside}, inside)' if masked else outside})\n"
        )

    def recursion(self, chains: range, careful: bool) -> str:
        """From the first site of the row to the last, in the order in which they depend on each other; ``careful`` divides at
        each site, and expects coefficients rather than quotients in the scratch."""
        step = "w = width - 1 - i\n" if self.transpose else "w = i\n"
        for c in chains:
            step += f"a{c} = load_scalar(s{c}, {self.rest if careful else 'w'})\n"
        # The nearest neighbour comes last: only its product waits for the previous step.
        for plane, (_, _, column) in sorted(enumerate(self.own, 1), key=lambda term: -abs(term[1][2])):
            for c in chains:
                solved = f"z{c}_{abs(column)}" if abs(column) <= _REGISTERS else f"load_scalar(z{c}, w + {column})"
                scratch = "s0" if self.shared and not careful else f"s{c}"
                step += f"a{c} = subtract_product_scalar(a{c}, load_scalar({scratch}, {plane} * padded + w), {solved})\n"
        for c in chains:
            step += f"a{c} = a{c} / load_scalar(s{c}, {self.diagonal})\n" if careful else ""
            step += f"store_scalar(row{c}, w, a{c})\n"
            step += f"store_scalar(z{c}, w, a{c})\n" if self.margin > _REGISTERS else ""
            for distance in reversed(self.registers):
                step += f"z{c}_{distance} = " + (f"z{c}_{distance - 1}\n" if distance > 1 else f"a{c}\n")
        zeros = "".join(f"z{c}_{distance} = zero_scalar()\n" for c in chains for distance in self.registers)
        return zeros + "for i in range(width):\n" + inside(step)

    def again(self, c: int) -> str:
        """The row once more, for the images where that is needed."""

        def undivided(masked):
            code = f"store(s{c}, {self.diagonal}, {diagonal_value(masked, self.log)})\n"
            for plane, (g, k, column) in enumerate(self.own, 1):
                code += f"store(s{c}, {plane} * padded + w, {self.terms.coefficient(g, k, column, masked)})\n"
            return code

        code = f"d_row = d{c} + r * width * {self.vector}\nc_row = c{c} + r * width * {self.coefficient}\n"
        code += self.terms.blocks(self.terms.own_row, undivided, self.terms.own_row) + self.recursion(
            range(c, c + 1), careful=True
        )
        return f"# Again, with a division a site, where a quotient left the normal range.\nif any_lane(unsafe{c}):\n" + inside(
            code
        )
