"""The files that every machine begins with, as far as tasks ask for them: those of Ubuntu's image, shortened.

There are the users and groups, what `useradd`, `su` and a login shell read, the home of the user `ubuntu`, and logs.
"""

from __future__ import annotations

# (name, number) as Debian and Ubuntu number them; each user has a group of the same name and number.
_USERS = (
    *(("root", 0), ("daemon", 1), ("bin", 2), ("sys", 3), ("games", 5), ("man", 6), ("lp", 7), ("mail", 8)),
    *(("news", 9), ("uucp", 10), ("proxy", 13), ("www-data", 33), ("backup", 34), ("list", 38), ("irc", 39)),
    *(("ubuntu", 1000), ("nobody", 65534)),
)
_OTHER_GROUPS = (
    *(("adm", 4), ("tty", 5), ("disk", 6), ("kmem", 15), ("dialout", 20), ("fax", 21), ("voice", 22), ("cdrom", 24)),
    *(("floppy", 25), ("tape", 26), ("sudo", 27), ("audio", 29), ("dip", 30), ("operator", 37), ("src", 40)),
    *(("shadow", 42), ("utmp", 43), ("video", 44), ("sasl", 45), ("plugdev", 46), ("staff", 50), ("users", 100)),
)
_GROUP_NUMBERS = {"games": 60, "man": 12}
"""Where the group of a user has another number."""
_GROUPS = (
    *((name, _GROUP_NUMBERS.get(name, number)) for name, number in _USERS if name != "nobody"),
    *_OTHER_GROUPS,
    ("nogroup", 65534),
)
_GROUP_OF = dict(_GROUPS) | {"nobody": 65534}
_HOMES = {
    "root": "/root",
    "bin": "/bin",
    "sys": "/dev",
    "games": "/usr/games",
    "man": "/var/cache/man",
    "ubuntu": "/home/ubuntu",
}
_HOME_FILES = {
    ".bashrc": "# Read by shells that are not login shells.\n",
    ".bash_logout": "# Read when a login shell ends.\n",
    ".profile": "if [ -f ~/.bashrc ]; then . ~/.bashrc; fi\n",
}
_LOGS = ("alternatives.log", "apt/history.log", "apt/term.log", "bootstrap.log", "dpkg.log")
_LOG = "2024-04-23 00:00:00 startup archives install\n2024-04-23 00:00:01 status installed base-files:amd64\n"
# Only the machine's root asks, and has no password.
_PAM = "auth sufficient pam_rootok.so\naccount required pam_permit.so\nsession required pam_permit.so\n"


def _passwd() -> str:
    rows = []
    for name, number in _USERS:
        shell = "/bin/bash" if name in ("root", "ubuntu") else "/usr/sbin/nologin"
        rows.append(f"{name}:x:{number}:{_GROUP_OF[name]}:{name}:{_HOMES.get(name, '/nonexistent')}:{shell}\n")
    return "".join(rows)


BASE_FILES = {
    "/etc/passwd": _passwd(),
    "/etc/shadow": "".join(f"{name}:*:19000:0:99999:7:::\n" for name, _ in _USERS),
    "/etc/group": "".join(f"{name}:x:{number}:\n" for name, number in _GROUPS),
    "/etc/gshadow": "".join(f"{name}:*::\n" for name, _ in _GROUPS),
    "/etc/hostname": "machine\n",
    "/etc/hosts": "127.0.0.1 localhost machine\n",
    "/etc/login.defs": "UID_MIN 1000\nUID_MAX 60000\nGID_MIN 1000\nGID_MAX 60000\nUSERGROUPS_ENAB yes\nUMASK 022\n",
    "/etc/nsswitch.conf": "passwd: files\ngroup: files\nshadow: files\nhosts: files\n",
    "/etc/profile": "",
    "/etc/shells": "/bin/sh\n/bin/bash\n",
    **{f"/etc/pam.d/{name}": _PAM for name in ("su", "su-l", "runuser", "runuser-l", "chpasswd", "other")},
    **{f"/root/{name}": text for name, text in _HOME_FILES.items() if name != ".bash_logout"},
    **{f"{home}/{name}": text for home in ("/etc/skel", "/home/ubuntu") for name, text in _HOME_FILES.items()},
    **{f"/var/log/{name}": _LOG for name in _LOGS},
}
"""Text by path."""
PRIVATE_FILES = ("/etc/shadow", "/etc/gshadow")
