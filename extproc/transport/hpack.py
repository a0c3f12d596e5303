"""Decode HPACK (RFC 7541) header blocks into (name, value) pairs of bytes.

A server that announces SETTINGS_HEADER_TABLE_SIZE 0 needs no state between blocks, so equal blocks mean equal headers
and a caller may cache by block. Until the peer has acknowledged that setting it may still use the default table of
4096 octets; for those first blocks a caller passes a `DynamicTable` of its connection.

Raises `HpackError` where the block breaks the format (a connection error, RFC 9113 4.3) and `HeadersTooLarge` where it
unfolds to more than the caller allows; a block is never unfolded further than that.
"""

from collections import deque
from typing import Final

_STATIC_NAMES: Final = (  # noqa: SIM905 - a table of 61 names reads better as text
    ":authority :method :method :path :path :scheme :scheme :status :status :status :status :status :status :status "
    "accept-charset accept-encoding accept-language accept-ranges accept access-control-allow-origin age allow "
    "authorization cache-control content-disposition content-encoding content-language content-length "
    "content-location content-range content-type cookie date etag expect expires from host if-match "
    "if-modified-since if-none-match if-range if-unmodified-since last-modified link location max-forwards "
    "proxy-authenticate proxy-authorization range referer refresh retry-after server set-cookie "
    "strict-transport-security transfer-encoding user-agent vary via www-authenticate"
).split()
_STATIC_VALUES: Final = {
    2: "GET",
    3: "POST",
    4: "/",
    5: "/index.html",
    6: "http",
    7: "https",
    16: "gzip, deflate",
    8: "200",
    9: "204",
    10: "206",
    11: "304",
    12: "400",
    13: "404",
    14: "500",
}
STATIC: Final = (
    (b"", b""),  # index 0 is not used
    *((name.encode(), _STATIC_VALUES.get(index, "").encode()) for index, name in enumerate(_STATIC_NAMES, 1)),
)
"""RFC 7541 appendix A"""

# RFC 7541 appendix B. The code is canonical: the bit lengths of its symbols (the last is EOS) say it all.
_CODE_LENGTHS: Final = bytes.fromhex(
    "0d171c1c1c1c1c1c1c181e1c1c1e1c1c1c1c1c1c1c1c1e1c1c1c1c1c1c1c1c1c060a0a0c0d06080b0a0a080b080606060505050606060606"
    "060607080f060c0a0d06070707070707070707070707070707070707070707070807080d130d0e060f050605060506060605070706060605"
    "06070605050607070707070f0b0e0d1c14161414161616171617171717171817181816171817171717151617161717181615141616171715"
    "1716161815161717151516151716171714161616171616171a1a1413161716191a1a1a1b1b1a181913151a1b1b1a1b1815151a1a1c1b1b1b"
    "14181415161515171616191918181a171a1b1a1a1b1b1b1b1b1c1b1b1b1b1b1a1e"
)
_EOS: Final = 256
_MAX_INTEGER: Final = 1 << 28
DEFAULT_TABLE_BYTES: Final = 4096


class HpackError(Exception):
    """The block cannot be decoded: the connection's compression state is lost."""


class HeadersTooLarge(Exception):  # noqa: N818 - a refusal of a well-formed block, not a failure of it
    """The headers are larger than the limit (RFC 9113 6.5.2 counts name, value and 32 octets for each)."""


class DynamicTable:
    """The entries a peer may refer to until it has acknowledged a table size of 0."""

    __slots__ = ("entries", "max_bytes", "size_bytes")

    def __init__(self) -> None:
        self.entries: deque[tuple[bytes, bytes]] = deque()
        self.size_bytes = 0
        self.max_bytes = DEFAULT_TABLE_BYTES

    def add(self, name: bytes, value: bytes) -> None:
        self.entries.appendleft((name, value))
        self.size_bytes += len(name) + len(value) + 32
        self._evict()

    def resize(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._evict()

    def _evict(self) -> None:
        while self.size_bytes > self.max_bytes:
            name, value = self.entries.pop()
            self.size_bytes -= len(name) + len(value) + 32


def _huffman_machine() -> tuple[list[tuple[tuple[int, bytes], ...]], frozenset[int]]:
    """The decoder: per state (an inner node of the code tree) and nibble the next state and what it emits, -1 being a
    broken code; and the states a string may end in, which up to 7 bits of ones lead to from the root (RFC 7541 5.2).
    """
    tree: list[list[int]] = [[0, 0]]  # children of each inner node; ~symbol for a leaf
    code = length = 0
    for symbol in sorted(range(_EOS + 1), key=lambda symbol: (_CODE_LENGTHS[symbol], symbol)):
        code <<= _CODE_LENGTHS[symbol] - length
        length = _CODE_LENGTHS[symbol]
        node = 0
        for shift in range(length - 1, 0, -1):
            bit = code >> shift & 1
            if not tree[node][bit]:
                tree.append([0, 0])
                tree[node][bit] = len(tree) - 1
            node = tree[node][bit]
        tree[node][code & 1] = ~symbol
        code += 1
    machine = []
    for start in range(len(tree)):
        row = []
        for nibble in range(16):
            node, emitted = start, b""
            for shift in (3, 2, 1, 0):
                node = tree[node][nibble >> shift & 1]
                if node == ~_EOS:
                    break
                if node < 0:
                    emitted += bytes((~node,))
                    node = 0
            row.append((-1 if node == ~_EOS else node, emitted))
        machine.append(tuple(row))
    padded = [0]
    while len(padded) < 8:
        padded.append(tree[padded[-1]][1])
    return machine, frozenset(padded)


_MACHINE, _PADDED = _huffman_machine()


def _huffman(data: bytes) -> bytes:
    machine = _MACHINE
    out = []
    state = 0
    for octet in data:
        state, emitted = machine[state][octet >> 4]
        if emitted:
            out.append(emitted)
        if state < 0:
            break
        state, emitted = machine[state][octet & 15]
        if emitted:
            out.append(emitted)
        if state < 0:
            break
    if state not in _PADDED:
        raise HpackError("broken Huffman code")
    return b"".join(out)


def _integer(block: bytes, pos: int, prefix: int) -> tuple[int, int]:
    """The integer that starts in the low `prefix` bits at `pos`, and the position after it."""
    mask = (1 << prefix) - 1
    value = block[pos] & mask
    pos += 1
    if value < mask:
        return value, pos
    shift = 0
    while True:
        octet = block[pos]
        pos += 1
        value += (octet & 127) << shift
        if value > _MAX_INTEGER or shift > 28:
            raise HpackError("integer too large")
        if octet < 128:
            return value, pos
        shift += 7


def _string(block: bytes, pos: int) -> tuple[bytes, int]:
    coded = block[pos] & 0x80
    length, pos = _integer(block, pos, 7)
    end = pos + length
    if end > len(block):
        raise HpackError("string runs past the block")
    data = block[pos:end]
    return (_huffman(data) if coded else data), end


def decode(block: bytes, max_bytes: int, table: DynamicTable | None = None) -> list[tuple[bytes, bytes]]:
    """The headers of one whole block, in order. Without a `table` the peer's table size is 0."""
    headers: list[tuple[bytes, bytes]] = []
    pos = size = 0
    end = len(block)
    try:
        while pos < end:
            first = block[pos]
            if first & 0x80:
                index, pos = _integer(block, pos, 7)
                pair = _entry(index, table)
            elif first & 0xE0 == 0x20:
                limit, pos = _integer(block, pos, 5)
                if headers or limit > (DEFAULT_TABLE_BYTES if table is not None else 0):
                    raise HpackError("misplaced or excessive table size update")
                if table is not None:
                    table.resize(limit)
                continue
            else:
                index, pos = _integer(block, pos, 6 if first & 0x40 else 4)
                if index:
                    name = _entry(index, table)[0]
                else:
                    name, pos = _string(block, pos)
                value, pos = _string(block, pos)
                pair = (name, value)
                if first & 0x40 and table is not None:
                    table.add(name, value)
            headers.append(pair)
            size += len(pair[0]) + len(pair[1]) + 32
            if size > max_bytes:
                raise HeadersTooLarge
    except IndexError:
        raise HpackError("block ends too early") from None
    return headers


def _entry(index: int, table: DynamicTable | None) -> tuple[bytes, bytes]:
    if index < len(STATIC):
        if index:
            return STATIC[index]
    elif table is not None and index - len(STATIC) < len(table.entries):
        return table.entries[index - len(STATIC)]
    raise HpackError("no such table entry")
