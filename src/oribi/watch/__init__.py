"""`oribi watch`: a local page that follows trainings. It reads what runs write and changes nothing in their folders.

`follow` reads files that grow, `runs` knows a run by its folder, `figures` says how it goes, `compare` sets runs side by side,
`data_rows` and `samples` show tokens and answers, `talk` and `answering` chat with a run's model in a process of its own, `page`
draws all of it with gradio, and `server` lets only the owner of the token in.
"""
