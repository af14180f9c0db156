"""A short general text, written for oribi, on which a run's report asks whether the model has forgotten other things.

It has nothing to do with any training data: prose of several kinds, a dialogue, a list, code and a little arithmetic.
"""

TEXT = """\
The harbour of a small town is quietest an hour before sunrise. The boats have gone out, the gulls have not yet come in, \
and the only sound is water against the stone steps. A woman who repairs nets sits in the doorway of her shed with a lamp \
beside her. She says that a good knot should be easy to check and hard to undo, and that most things worth making are like \
that. By the time the first bus arrives she has finished four metres and put the kettle on.

Water boils at a lower temperature on a mountain because the air above it presses less. At sea level that temperature is \
close to 100 degrees Celsius; at three thousand metres it is about 90. This is why rice takes longer to cook in a hut near \
a glacier than in a kitchen by the coast, and why a pressure cooker, which does the opposite, saves time and fuel. The same \
rule explains why cabins of aeroplanes are kept under pressure, and why a sealed bag of crisps swells during a flight.

When a town decides where to put a new library, it weighs several things that cannot be measured in the same unit. Land at \
the edge is cheap, but people without a car will not reach it. A site in the centre costs more and brings visitors to the \
shops around it. Some members of the council ask for figures, others for a walk through the streets at five in the \
afternoon. Both are right to ask. In the end the building stands near the school, and nobody remembers the argument.

"Did you lock the back door?" he asked.
"I thought you did," she said, "because you were the last one in the garden."
"I came in through the cellar."
They looked at each other, then at the dog, who had not moved from the sofa and did not look worried.
"If there were anyone in the kitchen," she said, "he would be asking them for cheese."

To plant a tree that will live: choose a place with room for the crown as well as the roots; dig a hole twice as wide as the \
root ball and no deeper; loosen the sides with a fork; set the trunk so that its base is level with the ground; fill the \
hole with the soil that came out of it; water slowly until nothing more sinks in; cover the surface with bark, but keep the \
bark away from the trunk. In the first two summers, water once a week. After that it will look after itself.

A function that finds the largest gap between neighbouring numbers can be written in a few lines of Python:

def largest_gap(numbers):
    ordered = sorted(numbers)
    gaps = [b - a for a, b in zip(ordered, ordered[1:])]
    return max(gaps, default=0)

For the list 3, 11, 4, 20 the ordered numbers are 3, 4, 11, 20, the gaps are 1, 7 and 9, and the answer is 9. Sorting takes \
most of the time, so the cost grows a little faster than the length of the list.

The printing press did not make books common at once. Paper had to become cheap, people had to learn to read, and sellers \
had to find out what strangers in distant cities would pay for. For fifty years most printers copied what scribes had \
already written: prayers, grammars, laws. Only later did someone notice that a page could be made for an hour's interest \
and thrown away, and the newspaper was born. Tools change the world slowly, and then the habits around them change quickly.

My grandmother kept a notebook of prices. On the left she wrote what she had paid, on the right what she thought the thing \
was worth. Bread was always worth more than it cost; lace always less. Once, in the summer of a dry year, both columns said \
the same for a basket of plums, and she underlined it twice. I have never found out whether she was pleased.

If a train leaves at 14:35 and the journey takes two hours and fifty minutes, it arrives at 17:25. If it is late by a fifth \
of the journey, that is 34 minutes, and it arrives at 17:59. Whoever meets it with flowers should bring a book as well.
"""
