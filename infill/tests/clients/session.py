"""A stream's whole life, driven by QEMU's own client library. Sends nothing that the schema does not have."""

import asyncio
import json
import os

from qemu.qmp import ExecuteError, QMPClient


class Manager:
    def __init__(self):
        self.qmp = QMPClient("manager")
        self.types = {}

    async def start(self, socket):
        await self.qmp.connect(socket)
        self.types = {one["name"]: one for one in await self.qmp.execute("query-qmp-schema")}

    def members(self, command):
        return {member["name"]: member for member in self.types[self.types[command]["arg-type"]]["members"]}

    async def run(self, command, arguments):
        members = self.members(command)
        # What depends on a word is not followed here.
        if "tag" not in self.types[self.types[command]["arg-type"]]:
            for name in arguments:
                assert name in members, f"{command} has no {name}"
        for name, member in members.items():
            assert "default" in member or name in arguments, f"{command} wants {name}"
        return await self.qmp.execute(command, arguments)


async def main():
    manager = Manager()
    await manager.start(os.environ["SOCKET"])
    told = {"greeting": manager.qmp.greeting.QMP.version["package"], "states": [], "refused": []}
    for command, arguments in (("no-such-command", {}), ("block-stream", {"device": "nowhere", "job-id": "j"})):
        try:
            await manager.qmp.execute(command, arguments)
        except ExecuteError as error:
            told["refused"].append(error.error_class)
    names = ("JOB_STATUS_CHANGE", "BLOCK_JOB_PENDING", "BLOCK_JOB_COMPLETED")
    with manager.qmp.listener(names) as events:
        for name, below in (("base", None), ("top", "base")):
            node = {"driver": "qcow2" if below else "raw", "node-name": name}
            node["file"] = {"driver": "file", "filename": os.path.join(os.environ["DIR"], name)}
            if below:
                node["backing"] = below
            await manager.run("blockdev-add", node)
        stream = {"job-id": "j", "device": "top", "auto-finalize": False, "auto-dismiss": False}
        await manager.run("block-stream", stream)
        async for event in events:
            for key in event["data"]:
                members = manager.members(event["event"])
                assert key in members, f"{event['event']} tells {key}"
            if event["event"] == "BLOCK_JOB_PENDING":
                await manager.run("job-finalize", {"id": "j"})
            if event["event"] == "BLOCK_JOB_COMPLETED":
                told["completed"] = event["data"]
            if event["event"] == "JOB_STATUS_CHANGE":
                status = event["data"]["status"]
                told["states"].append(status)
                if status == "concluded":
                    told["jobs"] = await manager.run("query-jobs", {})
                    await manager.run("job-dismiss", {"id": "j"})
                if status == "null":
                    break
    await manager.run("quit", {})
    try:
        await manager.qmp.disconnect()
    except EOFError:
        # The daemon was the first to hang up.
        pass
    print(json.dumps(told))


asyncio.run(main())
