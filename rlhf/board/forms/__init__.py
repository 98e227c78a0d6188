"""Forms of the stages, made from the options' own declarations: fields, what is sent back, the
command and the file that it stands for, and the look before a start.
"""
