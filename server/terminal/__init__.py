"""`pilothouse chat`: one conversation under several profiles, side by side in a terminal.

sources.py    where the replies come from: this process or a server
columns.py    what is known of each profile's conversation
show.py       columns on a terminal, or plain text
"""
