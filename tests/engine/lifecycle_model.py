"""A small model of the adapter life cycle: sets and bytes only, without files, threads and tensors."""


class LifecycleModel:
    """State of the adapters after commands. A source is a path, or a number for an adapter from memory.

    `sizes` are bytes by content, `disk` is the content by path.
    """

    def __init__(self, num_slots: int, num_host: int, sizes: list[int], disk: dict[str, int]) -> None:
        self.num_slots, self.num_host, self.sizes, self.disk = num_slots, num_host, sizes, disk
        self.max_pinned = (num_slots if num_slots > 1 else num_host) - 1
        self.sources: dict[str, str | int] = {}
        self.versions: dict[str, tuple[str, int, int]] = {}  # name: (name, serial number, content)
        self.host: list[str] = []  # least recently used first
        self.slots: list[tuple[str, int, int]] = []  # least recently used first
        self.pinned: set[str] = set()

    def run(self, command: str, name: str, source: str | int | None = None) -> int | str:
        """Run a command; return the resulting content of the name, or the name of the error."""
        known, is_first = self.sources.get(name), command in ("LOAD", "GENERATE") and name not in self.sources
        if known is None and not is_first:
            return "AdapterNotFound"
        if command == "UNLOAD":
            self.slots = [version for version in self.slots if version[0] != name]
            self.host = [other for other in self.host if other != name]
            self.pinned.discard(name)
            del self.sources[name], self.versions[name]
            return 0
        if command == "PIN" and len(self.pinned - {name}) >= self.max_pinned:
            return "AdapterError"
        is_swap = is_first or command == "RELOAD" or (isinstance(known, int) and isinstance(source, int))
        wanted = source if source is not None else known if known is not None else "p0"
        if is_swap and source is None and isinstance(known, int):
            return "AdapterNotFound"  # tensors cannot be read again
        is_gone = name not in self.host and self.versions.get(name) not in self.slots
        changed = isinstance(known, str) and is_gone and self.disk[known] != self.versions[name][2]
        if not self.has_room(name) or (not is_swap and (wanted != known or changed)):
            return "AdapterError"
        if is_swap:
            self.slots = [version for version in self.slots if version[0] != name]
            serial = self.versions[name][1] + 1 if known is not None else 0
            self.sources[name], content = wanted, self.disk[wanted] if isinstance(wanted, str) else wanted
            self.versions[name] = name, serial, content
        self.pinned |= {name} if command == "PIN" else set()
        self.host = [other for other in self.host if other != name] + [name]
        idle = [other for other in self.host if other != name and not self.is_fixed(other)]
        self.host = [other for other in self.host if other not in idle[: max(0, len(self.host) - self.num_host)]]
        if command == "GENERATE" or (command == "PIN" and self.num_slots > 1):
            self.activate(self.versions[name])
        return self.versions[name][2]

    def activate(self, version: tuple[str, int, int]) -> None:
        held = self.pinned if self.num_slots > 1 else ()
        free = [other for other in self.slots if other[0] not in held and other != version]
        gone = free[: max(0, len({*self.slots, version}) - self.num_slots)]
        self.slots = [other for other in self.slots if other not in (*gone, version)] + [version]

    def is_fixed(self, name: str) -> bool:
        return name in self.pinned or isinstance(self.sources[name], int)

    def has_room(self, name: str) -> bool:
        return name in self.host or sum(map(self.is_fixed, self.host)) < self.num_host
