trl dpo \
    --model_name_or_path HuggingFaceTB/SmolLM2-135M-Instruct \
    --dataset_name trl-lib/ultrafeedback_binarized \
    --use_peft \
    --lora_r 32 \
    --lora_dropout 0.05 \
    --output_dir runs/dpo
