"""Strings that would run code or open a file, and a record of the files that are opened."""

import sys
from typing import Any

PAYLOADS = {
    "code": "open({witness!r}, 'w') and [(1, 4)]",
    "code in a literal": "[(1, 4), open({witness!r}, 'w')]",
    "import": "__import__('pathlib').Path({witness!r}).touch()",
    "setting": '{{"beam": "{witness}"}}',
    "file": "{witness}",
    "file from here": "../../../../../../../../..{witness}",
    "address": "http://localhost:1{witness}",
    "interpolation": "${{oc.env:HOME}}",
    "override": "x,hydra.searchpath=[{witness}]",
    "class": "{{_target_: pathlib.Path, _args_: [{witness}]}}",
}


class Watch:
    """Records the files that the process opens."""

    def __init__(self) -> None:
        self.opened: list[str] = []
        self.active = False
        sys.addaudithook(self.hook)

    def hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.active and event in ("open", "os.listdir", "os.mkdir", "socket.connect"):
            self.opened.append(str(arguments[0]))
