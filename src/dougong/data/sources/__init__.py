"""Turns public collections into tables that every other part of Dougong can read.

Here        one file per collection (easy_vqa, digits, uci_views, seen_and_spoken, xor, emoji), the speech that easy_vqa
            is asked in (speech), reading npm packages (npm), and what the sources share (staging).
Elsewhere   reading the tables, and what a cell of a modality becomes (the rest of data).
Promise     a source keeps apart what must stay apart (speakers, official splits), calls synthetic data synthetic,
            and needs no network: it reads an installed package or a folder that the user names. Where it can also
            have pip or npm fetch a package, it names the folder to give instead.
"""
