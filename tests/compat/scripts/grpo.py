from unsloth import FastLanguageModel, PatchFastRL
PatchFastRL("GRPO", FastLanguageModel)
import re
from datasets import load_dataset
max_seq_length = 128
lora_rank = 8
model, tokenizer = FastLanguageModel.from_pretrained(model_name = "tiny", max_seq_length = max_seq_length, load_in_4bit = True,
    fast_inference = True, max_lora_rank = lora_rank, gpu_memory_utilization = 0.9)
model = FastLanguageModel.get_peft_model(model, r = lora_rank, lora_alpha = lora_rank * 2, use_gradient_checkpointing = "unsloth",
    random_state = 3407)
dataset = load_dataset("json", data_files = "questions.jsonl", split = "train")
dataset = dataset.map(lambda x: { "prompt" : [{"role": "system", "content": "think"}, {"role": "user", "content": x["question"]}],
                                  "answer": x["answer"] })
def correctness_reward_func(prompts, completions, answer, **kwargs) -> list[float]:
    responses = [completion[0]["content"] for completion in completions]
    return [2.0 if a in r else 0.0 for r, a in zip(responses, answer)]
def xmlcount_reward_func(completions, **kwargs) -> list[float]:
    return [0.1 * len(completion[0]["content"]) for completion in completions]
max_prompt_length = max(len(tokenizer.apply_chat_template(p, add_generation_prompt = True, tokenize = True)) for p in dataset["prompt"]) + 1
assert max_prompt_length > 8
from vllm import SamplingParams
vllm_sampling_params = SamplingParams(min_p = 0.1, top_p = 1.0, top_k = -1, seed = 3407, stop = [tokenizer.eos_token],
    include_stop_str_in_output = True)
from trl import GRPOConfig, GRPOTrainer
training_args = GRPOConfig(
    use_vllm = True,
    vllm_sampling_params = vllm_sampling_params,
    temperature = 1.0,
    learning_rate = 5e-6, adam_beta1 = 0.9, adam_beta2 = 0.99, weight_decay = 0.1, warmup_ratio = 0.1,
    lr_scheduler_type = "cosine", optim = "adamw_8bit", logging_steps = 1, per_device_train_batch_size = 1,
    gradient_accumulation_steps = 1, num_generations = 4, max_prompt_length = max_prompt_length,
    max_completion_length = 8, max_steps = 2, save_steps = 250, max_grad_norm = 0.1, report_to = "none", output_dir = "outputs",
)
trainer = GRPOTrainer(model = model, processing_class = tokenizer, reward_funcs = [xmlcount_reward_func, correctness_reward_func],
                      args = training_args, train_dataset = dataset)
trainer.train()
model.save_lora("grpo_saved_lora")
text = tokenizer.apply_chat_template([{"role" : "user", "content" : "red fox"}], tokenize = False, add_generation_prompt = True)
sampling_params = SamplingParams(temperature = 0.8, top_p = 0.95, max_tokens = 6)
output = model.fast_generate([text], sampling_params = sampling_params, lora_request = None)[0].outputs[0].text
output = model.fast_generate(text, sampling_params = sampling_params, lora_request = model.load_lora("grpo_saved_lora"))[0].outputs[0].text
