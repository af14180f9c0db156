from unsloth import FastLanguageModel
import gc, re, torch
import numpy as np
import pandas as pd
max_seq_length = 256
lora_rank = 8
model, tokenizer = FastLanguageModel.from_pretrained(model_name = "tiny", max_seq_length = max_seq_length, load_in_4bit = False,
    fast_inference = True, max_lora_rank = lora_rank, gpu_memory_utilization = 0.9)
model = FastLanguageModel.get_peft_model(model, r = lora_rank, lora_alpha = lora_rank*2, use_gradient_checkpointing = "unsloth")
reasoning_start, reasoning_end, solution_start, solution_end = "<think>", "</think>", "<SOLUTION>", "</SOLUTION>"
system_prompt = f"Think between {reasoning_start} and {reasoning_end}."
chat_template = \
    "{% for message in messages %}"\
        "{% if message['role'] == 'assistant' %}{{ message['content'] + eos_token }}{% else %}{{ message['content'] + '\n' }}{% endif %}"\
    "{% endfor %}"\
    "{% if add_generation_prompt %}{{ '{reasoning_start}' }}{% endif %}"
tokenizer.chat_template = chat_template.replace("'{reasoning_start}'", f"'{reasoning_start}'")
from datasets import Dataset, load_dataset
dataset = load_dataset("json", data_files = "reasoning.jsonl", split = "train").to_pandas()
dataset["Messages"] = dataset.apply(lambda x: [
    {"role" : "system", "content" : system_prompt},
    {"role" : "user", "content" : x["problem"]},
    {"role" : "assistant", "content" : reasoning_start + x["thinking"] + reasoning_end + solution_start + x["solution"] + solution_end},
], axis = 1)
dataset["N"] = dataset["Messages"].apply(lambda x: len(tokenizer.apply_chat_template(x)))
assert dataset["N"].min() > 20
dataset = dataset.loc[dataset["N"] <= max_seq_length/2].copy()
dataset["text"] = tokenizer.apply_chat_template(dataset["Messages"].values.tolist(), tokenize = False)
dataset = Dataset.from_pandas(dataset)
from trl import SFTTrainer, SFTConfig
trainer = SFTTrainer(model = model, tokenizer = tokenizer, train_dataset = dataset, args = SFTConfig(dataset_text_field = "text",
    per_device_train_batch_size = 1, gradient_accumulation_steps = 1, max_steps = 2, optim = "adamw_8bit", report_to = "none"))
trainer.train()
text = tokenizer.apply_chat_template(dataset[0]["Messages"][:2], tokenize = False, add_generation_prompt = True)
_ = model.generate(**tokenizer(text, return_tensors = "pt").to(model.device), temperature = 0, max_new_tokens = 4)
del dataset
torch.cuda.empty_cache()
gc.collect()
dataset = load_dataset("json", data_files = "questions.jsonl", split = "train")
dataset = dataset.map(lambda x: { "prompt" : [{"role": "system", "content": system_prompt}, {"role": "user", "content": x["question"]}] })
match_format = re.compile(rf"{reasoning_end}.*?{solution_start}(.+?){solution_end}", flags = re.MULTILINE | re.DOTALL)
def match_format_exactly(completions, **kwargs):
    return [3.0 if match_format.search(completion[0]["content"]) is not None else 0 for completion in completions]
global PRINTED_TIMES
PRINTED_TIMES = 0
def check_answer(prompts, completions, answer, **kwargs):
    global PRINTED_TIMES
    question = prompts[0][-1]["content"]
    if PRINTED_TIMES % 5 == 0: print(f"Question:\n{question}\nAnswer:\n{answer[0]}\nResponse:\n{completions[0][0]['content']}")
    PRINTED_TIMES += 1
    return [5.0 if a in c[0]["content"] else -0.1*len(c[0]["content"]) for c, a in zip(completions, answer)]
tokenized = dataset.map(
    lambda x: {"tokens" : tokenizer.apply_chat_template(x["prompt"], add_generation_prompt = True, tokenize = True)}, batched = True)
tokenizer.decode(tokenized[0]["tokens"])
tokenized = tokenized.map(lambda x: {"L" : len(x["tokens"])})
maximum_length = int(np.quantile(tokenized["L"], 0.9))
dataset = dataset.select(np.where(np.array(tokenized["L"]) <= maximum_length)[0])
from vllm import SamplingParams
from trl import GRPOConfig, GRPOTrainer
training_args = GRPOConfig(
    vllm_sampling_params = SamplingParams(min_p = 0.1, top_p = 1.0, top_k = -1, seed = 3407, stop = [tokenizer.eos_token]),
    temperature = 1.0, learning_rate = 5e-6, warmup_ratio = 0.1, optim = "adamw_8bit", logging_steps = 1,
    importance_sampling_level = "sequence", loss_type = "dr_grpo", mask_truncated_completions = False, epsilon = 0.2, epsilon_high = 0.28,
    per_device_train_batch_size = 1, gradient_accumulation_steps = 1, num_generations = 4, max_prompt_length = maximum_length + 1,
    max_completion_length = 6, max_steps = 2, save_steps = 100, report_to = "none", output_dir = "outputs",
)
trainer = GRPOTrainer(model = model, processing_class = tokenizer, reward_funcs = [match_format_exactly, check_answer],
                      args = training_args, train_dataset = dataset)
trainer.train()
model.save_lora("grpo_saved_lora")
from safetensors import safe_open
with safe_open("grpo_saved_lora/adapter_model.safetensors", framework = "pt") as f:
    for key in f.keys():
        tensor = f.get_tensor(key)
        n_zeros = (tensor == 0).sum() / tensor.numel()
        assert(n_zeros.item() != tensor.numel())
if False: model.save_pretrained_merged("model", tokenizer, save_method = "merged_16bit",)
